"""Every verb that runs a model runs it on the chosen device, and nothing of it on the CPU.

`far_device` is the device: an operation with tensors of both devices raises, as on a GPU, and every
module that runs is counted on its side. It has no float64, as Apple's GPUs. BAR: placements missed,
0 over every verb.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from far_device import FAR, Seen, far_device
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.backbones import device as placement
from trainer.training import build

CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"
RUN = [
    "run.steps=2", "run.batch_size=2", "run.validate_every=2", "run.checkpoint_every=2",
    "run.precision=fp32", "preview.every=2", "preview.steps=1", "preview.prompts=[a <v1> here]",
    "data.prior_images=2", "data.prior_steps=1", "data.prior_prompts=[a fox]",
    "data.class_word=null", "data.augment=false", "methods.new_token.init=animal", "optim.ema=0.9",
    "tracker=none",
    "evaluate.alone=[a <v1> on a blue background]", "evaluate.beside=[]", "evaluate.steps=1",
    "evaluate.known=[]",  # 64 pictures, made and named as those of the concept are
]  # fmt: skip


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Every choice of a device is the one of the test; caches are new."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_device", lambda name, rank: FAR)
        patch.setenv("TRAINER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield patch


def ran(*words: object) -> Seen:
    """What a command ran where."""
    with far_device() as seen:
        assert main([str(word) for word in words]) == 0
    return seen


def trained(folder: Path, backbone: Path, recipe: str, *words: str) -> Seen:
    given = {word.split("=")[0] for word in words}
    own = [word for word in RUN if word.split("=")[0] not in given]
    return ran("fit", f"recipe={recipe}", f"backbone={backbone}", f"run={folder}", *own, *words)


@pytest.fixture(scope="module")
def run(
    device: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path
) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, trained(folder, tiny_folder, "custom_diffusion")


def all_placed(seen: Seen, *kinds: str) -> None:
    assert not seen.missed
    assert set(kinds) <= set(seen.placed)


def test_fit(
    run: tuple[Path, Seen], tiny_folder: Path, tmp_path: Path, device: pytest.MonkeyPatch
) -> None:
    """Class images, latents, previews, validation and steps; the adapter is that of the CPU."""
    folder, seen = run
    all_placed(seen, "Linear", "Conv2d", "Embedding")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement, "_device", lambda name, rank: torch.device("cpu"))
        patch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
        cpu = trained(tmp_path / "cpu", tiny_folder, "custom_diffusion")
    assert not cpu.placed and cpu.missed == seen.placed  # the test can fail, and misses nothing
    far, near = (load_file(each / "adapter.safetensors") for each in (folder, tmp_path / "cpu"))
    assert far.keys() == near.keys()
    assert all(torch.allclose(value, near[name], atol=1e-5) for name, value in far.items())


def test_starts_and_ends_that_look_at_the_data(
    device: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    """InfLoRA reads the inputs of its layers before the first step and after the last."""
    words = ("methods.new_token=null", "preview.prompts=[]", "continual.concepts=[]")
    words = (*words, "data.prior_weight=1", "run.validate_every=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "PREPARING", 2)  # batches
        seen = trained(tmp_path / "run", tiny_folder, "inflora", *words)
    all_placed(seen, "Linear", "Conv2d")


def test_continual(device: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path) -> None:
    words = ["continual.images=2", f"continual.judge={CLIP}", "preview.prompts=[]"]
    words += ["continual.concepts=[sprite:penguin, sprite:strawberry]", "run.steps=1"]
    words += ["data.prior_weight=1", "run.validate_every=0"]
    seen = trained(tmp_path / "run", tiny_folder, "c_lora", *words)
    all_placed(seen, "Linear", "Conv2d")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("source", ["adapter", "backbone"])
def test_sample(source: str, run: tuple[Path, Seen], tiny_folder: Path, tmp_path: Path) -> None:
    model = run[0] if source == "adapter" else tiny_folder
    seen = ran(
        "sample", f"{source}={model}", "prompt=a fox", "steps=2", f"out={tmp_path}",
        "precision=fp32",
    )  # fmt: skip
    all_placed(seen, "Linear", "Conv2d", "Embedding")


def test_evaluate(run: tuple[Path, Seen]) -> None:
    seen = ran("evaluate", f"run={run[0]}", f"judge={CLIP}", "images=2", "precision=fp32")
    all_placed(seen, "Linear", "Conv2d", "CLIPVisionEmbeddings")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("form", ["merged", "custom_diffusion"])
def test_export(form: str, run: tuple[Path, Seen], tmp_path: Path) -> None:
    out = tmp_path / "out"
    all_placed(ran("export", f"run={run[0]}", f"out={out}", f"format={form}"), "Linear", "Conv2d")
    words = ("import", f"file={out}", f"out={tmp_path / 'again.safetensors'}")
    if form == "custom_diffusion":
        all_placed(ran(*words, f"backbone={backbone_of(run[0])}"), "Linear", "Conv2d")


def backbone_of(run: Path) -> str:
    from trainer.config.header import read_header

    return str(read_header(run / "adapter.safetensors")[0]["backbone"])


def test_merge(run: tuple[Path, Seen], tmp_path: Path) -> None:
    adapter = f"adapter=[{run[0]},{run[0]}]"
    seen = ran("merge", adapter, f"out={tmp_path / 'both.safetensors'}")
    all_placed(seen, "Linear", "Conv2d")


def test_check_and_inspect(device: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path) -> None:
    """`data inspect` generates the class images; `check plan=true` only counts."""
    words = [word for word in RUN if not word.startswith("data.prior_images")]
    recipe = ["recipe=custom_diffusion", f"backbone={tiny_folder}", *words]
    out = f"out={tmp_path / 'sheet.png'}"
    all_placed(ran("data", "inspect", *recipe, "data.prior_images=3", "count=4", out), "Conv2d")
    placed: list[torch.device] = []
    original = placement.place

    def recorded(model: object, where: placement.Placement, *args: object, **kwargs: object):
        placed.append(where.device)
        return original(model, where, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.runs.adapter.place", recorded)
        patch.setattr("trainer.training.adapt_backbone.place", recorded)
        patch.setattr(placement, "_device", lambda name, rank: torch.device("cpu", 0))
        assert main(["check", *recipe, "plan=true"]) == 0
    assert placed and set(placed) == {torch.device("cpu")}  # where no weight is read
