"""The verbs on a CUDA device: pictures, losses and proofs are those of the CPU, up to rounding.

pytest -m gpu tests/cli/test_gpu.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.backbones.device import CPU, choose_placement
from trainer.config.lineage import backbone_spec
from trainer.diffusion.inversion import invert
from trainer.runs.adapter import load_adapted, load_base

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CLIP = Path(__file__).parents[2] / "data" / "tiny" / "clip"
RUN = [
    "recipe=custom_diffusion", "run.steps=4", "run.batch_size=4", "run.validate_every=2",
    "run.checkpoint_every=2", "preview.every=2", "preview.steps=2", "run.log_every=1",
    "preview.prompts=[a <v1> here]", "data.prior_images=4", "data.prior_prompts=[a fox]",
    "data.class_word=null", "data.augment=false", "methods.new_token.init=animal",
    "optim.ema=0.9", "tracker=none", "evaluate.beside=[]",
    "evaluate.alone=[a <v1> on a blue background]",
    "evaluate.known=['{} on a white background']",
]  # fmt: skip
# products of fp32 are rounded to 10 bits in a GPU's convolutions, see torch.backends.cudnn
LEVELS = 2.0  # of 255, the mean difference that leaves


def command(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def trained(folder: Path, backbone: Path, *words: str) -> Path:
    command("fit", *RUN, f"backbone={backbone}", f"run={folder}", *words)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """The same run in fp32 on both devices, with class images and latents of its own."""
    found = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path_factory.mktemp(device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRAINER_CACHE", str(folder / "cache"))
            words = (f"run.device={device}", "run.precision=fp32")
            found[device] = trained(folder / "run", tiny_folder, *words)
    return found


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_fit(runs: dict[str, Path]) -> None:
    assert losses(runs["cuda"]) == pytest.approx(losses(runs["cpu"]), rel=1e-2)
    near, far = (load_file(runs[each] / "adapter.safetensors") for each in ("cpu", "cuda"))
    assert near.keys() == far.keys()
    assert all((far[name] - near[name]).abs().mean() < 1e-3 for name in near)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fit_in_half_precision(precision: str, tiny_folder: Path, tmp_path: Path) -> None:
    words = ("run.device=cuda", f"run.precision={precision}")
    run = trained(tmp_path / "run", tiny_folder, *words)
    assert all(np.isfinite(losses(run)))
    assert all(
        value.dtype == torch.float32 for value in load_file(run / "adapter.safetensors").values()
    )


@pytest.mark.parametrize(("precision", "levels"), [("fp32", LEVELS), ("bf16", 12.0), ("fp16", 4.0)])
def test_sample(precision: str, levels: float, runs: dict[str, Path], tmp_path: Path) -> None:
    words = (
        "sample",
        f"adapter={runs['cpu']}",
        "prompt=a <v1>",
        "steps=5",
        "count=2",
        "sheet=false",
    )
    command(*words, f"out={tmp_path / 'cpu'}", "device=cpu", "precision=fp32")
    command(*words, f"out={tmp_path / 'cuda'}", "device=cuda", f"precision={precision}")
    names = sorted(path.name for path in (tmp_path / "cpu").iterdir())
    assert len(names) == 2
    for name in names:
        near, far = (
            np.asarray(Image.open(tmp_path / each / name), dtype=float) for each in ("cpu", "cuda")
        )
        assert np.abs(near - far).mean() < levels


def test_evaluate(runs: dict[str, Path]) -> None:
    tables: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        words = (f"judge={CLIP}", "images=4", f"device={device}", "precision=fp32")
        command("evaluate", f"run={runs['cpu']}", *words)
        tables[device] = json.loads((runs["cpu"] / "evaluation.json").read_text())
    for column, scores in tables["cpu"].items():
        for name in ("CLIP-I", "validation loss"):
            assert tables["cuda"][column][name] == pytest.approx(scores[name], rel=0.05)


@pytest.mark.parametrize("form", ["merged", "custom_diffusion"])
def test_export_is_proven_exactly(form: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """The bar of a proof, 1e-5, holds on a GPU; the file is the one that a CPU writes."""
    for device in ("cpu", "cuda"):
        words = (f"run={runs['cpu']}", f"out={tmp_path / device}", f"format={form}")
        command("export", *words, f"device={device}")
    files = [
        path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.safetensors")
    ]
    assert files
    for file in files:
        assert (tmp_path / "cpu" / file).read_bytes() == (tmp_path / "cuda" / file).read_bytes()


def test_memory_of_held_weights(tiny_folder: Path) -> None:
    """Half of the denoiser's bytes in half precision."""
    sizes = {}
    for precision in ("fp32", "bf16"):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = load_base(
            backbone_spec(str(tiny_folder)), "tiny", choose_placement("cuda", precision)
        )
        torch.cuda.synchronize()
        sizes[precision] = torch.cuda.memory_allocated() - before
        vae = sum(value.nbytes for value in model.vae.parameters())
        del model
        sizes[precision] -= vae
    assert sizes["bf16"] < 0.65 * sizes["fp32"]


def test_inversion_goes_there_and_back(runs: dict[str, Path]) -> None:
    model, _ = load_adapted(
        runs["cpu"] / "adapter.safetensors", placement=choose_placement("cuda", "fp32")
    )
    near, _ = load_adapted(runs["cpu"] / "adapter.safetensors", placement=CPU)
    x = torch.randn(1, model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    far = invert(model, x, [""], 5).cpu()
    assert torch.allclose(far, invert(near, x, [""], 5), atol=5e-2)
