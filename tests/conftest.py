"""A whole pipeline folder with a very small random U-Net, and one way to train on it for a step or
two."""

from __future__ import annotations

import gc
import os

gc.disable()  # while all is imported and collected, which stays, see `pytest_collection_finish`
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))

import functools
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded import copied, read_once
from torch.utils._device import _device_constructors

pytest_plugins = ["denoisers"]
CACHE = tempfile.mkdtemp(prefix="trainer-tests-")
os.environ["TRAINER_CACHE"] = CACHE
DATA = Path(__file__).parent.parent / "data" / "tiny"
PARTS = ("text_encoder", "tokenizer", "vae", "scheduler")
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 128,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
DIT: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "caption_channels": 128,
}

LARGE = 1 << 20  # values, as only models of full size have; to fill them takes seconds
SHARED: set[Path] = set()  # folders that no test changes
Train = Callable[..., list[float]]


@pytest.fixture(autouse=True)
def no_service_of_an_earlier_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of wandb in this process leaves the address of its service, which ends with it, in the
    environment that the commands of later tests inherit."""
    for name in ("WANDB_SERVICE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def _parts_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        read_once(patch)
        yield


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; left out with -m 'not slow'")
    torch.set_num_threads(THREADS)
    _poison_empty()
    config.addinivalue_line(
        "markers",
        "sampled(n, each=()): n of its cases, others in every run, and n for each value of the "
        "parameters in `each`; all with CASES=all",
    )
    # which cases this run tries; workers of pytest-xdist inherit the choice
    os.environ.setdefault("CASE_SEED", str(int.from_bytes(os.urandom(4), "big")))


def pytest_report_header() -> str:
    seed = os.environ["CASE_SEED"]
    return f"cases: CASE_SEED={seed} repeats this run's choice, CASES=all tries each"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Draws cases of tests that are `sampled`, unless tests were chosen by name."""
    chosen = bool(config.option.keyword) or any("::" in word for word in config.args)
    if chosen or os.environ.get("CASES") == "all":
        return
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if (own := item.get_closest_marker("sampled")) is not None:
            each = (str(item.callspec.params[key]) for key in own.kwargs.get("each", ()))  # type: ignore[attr-defined]
            name = " ".join((item.nodeid.partition("[")[0], *each))
            groups.setdefault(name, []).append(item)
    left: set[pytest.Item] = set()
    for name, cases in groups.items():
        mark = cases[0].get_closest_marker("sampled")
        assert mark is not None
        count = min(mark.args[0], len(cases))
        left |= set(cases) - set(random.Random(os.environ["CASE_SEED"] + name).sample(cases, count))
    config.hook.pytest_deselected(items=sorted(left, key=lambda item: item.nodeid))
    items[:] = [item for item in items if item not in left]


def pytest_collection_finish() -> None:
    """What is imported by now stays, so that no collection of garbage looks at it again; and fewer
    collections: a quarter of the time that a small model takes to load went into them."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000)
    gc.enable()


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


def _poison_empty() -> None:
    """Memory nobody wrote reads as NaN, so a test that depends on it fails every time."""
    _device_constructors()  # keeps a list of the true functions from here on
    for name in ("empty", "empty_like"):
        setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if torch.compiler.is_compiling() or not made.dtype.is_floating_point:
            return made
        if made.numel() > LARGE:
            return made
        return made.detach().fill_(torch.nan).requires_grad_(made.requires_grad)

    return poisoned


def make_folder(folder: Path, **changes: Any) -> Path:
    """The shipped pipeline with a seeded random U-Net in the place of its own."""
    from diffusers import UNet2DConditionModel

    for part in PARTS:
        shutil.copytree(DATA / part, folder / part)
    shutil.copy(DATA / "model_index.json", folder)
    torch.manual_seed(0)
    UNet2DConditionModel(**(UNET | changes)).save_pretrained(folder / "unet")
    return folder


def shared(folder: Path) -> Path:
    SHARED.add(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(make_folder(tmp_path_factory.mktemp("backbone") / "tiny"))


@pytest.fixture(scope="session")
def stacked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two transformer blocks behind each other in every attention."""
    folder = tmp_path_factory.mktemp("backbone") / "stacked"
    return shared(make_folder(folder, transformer_layers_per_block=2))


def make_dit_folder(folder: Path, **changes: Any) -> Path:
    """The shipped parts with a seeded random transformer, trained as a flow or so it says."""
    from diffusers import PixArtTransformer2DModel

    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(DATA / part, folder / part)
    shutil.copytree(DATA.parent / "tiny_dit" / "scheduler", folder / "scheduler")
    shutil.copy(DATA.parent / "tiny_dit" / "model_index.json", folder)
    torch.manual_seed(0)
    PixArtTransformer2DModel(**(DIT | changes)).save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def dit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared(make_dit_folder(tmp_path_factory.mktemp("backbone") / "dit"))


@pytest.fixture
def dit(dit_folder: Path, open_folder: Callable[[Path], Any]) -> Any:
    """A fresh `PixArt` that a test may edit."""
    return open_folder(dit_folder)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but its U-Net has other shapes."""
    folder = tmp_path_factory.mktemp("backbone") / "other"
    return make_folder(folder, block_out_channels=(16, 48))


@pytest.fixture(scope="session")
def open_folder() -> Callable[[Path], Any]:
    """`open_folder(folder)`: a fresh backbone that a test may edit. Those of a session's fixtures
    are loaded once and copied, which takes a tenth of the time."""
    from trainer.backbones import load_backbone
    from trainer.config.lineage import backbone_spec

    loaded: dict[Path, Any] = {}

    def load(folder: Path) -> Any:
        return load_backbone(backbone_spec(str(folder)), str(folder)).eval()

    def opened(folder: Path) -> Any:
        if folder not in SHARED:
            return load(folder)
        if folder not in loaded:
            loaded[folder] = load(folder)
        # a copied CLIPTokenizer decodes otherwise than one that is read
        own = loaded[folder].tokenizers.values()
        read = {id(each): type(each).from_pretrained(each.name_or_path) for each in own}
        return copied(loaded[folder], read)

    return opened


@pytest.fixture
def save_trained_on(open_folder: Callable[[Path], Any], tmp_path: Path) -> Callable[..., Path]:
    """`save_trained_on(folder, methods, **sections)`: the adapter file that these methods make of
    the backbone in a folder, every trained tensor moved a little, with further sections of a
    recipe."""
    from trainer.config.load import methods_of
    from trainer.methods.apply import apply_methods
    from trainer.runs.adapter import save_adapter

    def save(folder: Path, methods: dict[str, Any], name: str = "trained", **more: Any) -> Path:
        model = open_folder(folder)
        plan = apply_methods(model, methods_of(methods))
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key in plan.names:
                own[key] += 0.01 * torch.randn(own[key].shape, generator=generator)
        path = tmp_path / f"{name}.safetensors"
        tensors = {key: own[key] for key in plan.stored}
        header = {"backbone": str(folder), "methods": methods, **more}
        save_adapter(path, tensors, tree=header, identity=model.identity())
        return path

    return save


@pytest.fixture
def tiny(tiny_folder: Path, open_folder: Callable[[Path], Any]) -> Any:
    """A fresh `StableDiffusion` that a test may edit."""
    return open_folder(tiny_folder)


@pytest.fixture(scope="session")
def photos() -> Any:
    """Five scenes of a penguin, captioned `a <v1> ...`: a dataset as the concept source makes
    it."""
    from trainer.data.source import Needs
    from trainer.data.sources.concept import Concept

    def paint(prompts: Sequence[str], seed: int, guidance: float | None) -> Any:
        raise AssertionError("no class images are asked for")

    source = Concept(concept="sprite:penguin", augment=False, prior_weight=0)
    train, _ = source.open(Needs(32, 4, paint, Path(CACHE), lambda: "tiny"))
    return train


@pytest.fixture(scope="session")
def train(photos: Any) -> Train:
    """`train(backbone, plan, steps=2, frames=1)`: the module that `fit` builds takes its own
    training steps, on real batches of two images, or of one clip that shows the two; AdamW with
    weight decay. Returns the losses."""
    from trainer.config.load import load_recipe
    from trainer.data.loader import Planned
    from trainer.data.plan import StepPlan
    from trainer.training.build import inputs_of, module_of

    groups = tuple((group.start, group.stop) for group in photos.groups)
    plan_of_steps = StepPlan(groups, (1.0,), (1.0,), 2, 0)
    words = ["recipe=lora", "optim.lr=1e-2", "optim.weight_decay=0.1", "optim.schedule=constant"]
    words += ["methods.new_token=null", "data.token=sks", "objective.timesteps=uniform"]

    @functools.cache
    def recipe(steps: int) -> Any:
        return load_recipe([*words, f"run.steps={steps}"])

    def batch(backbone: Any, step: int, frames: int) -> Any:
        reads = inputs_of(backbone)
        found = Planned(photos, plan_of_steps, None, 0, 1, reads=reads)[step]
        if frames == 1:
            return found
        own = {
            name: getattr(found, name)[:1] for name in ("positions", "captions", "keys", "weights")
        }
        # the inputs of the two pictures are those of the frames of the clip
        inputs = {name: value.flatten(0, 1)[None] for name, value in found.inputs.items()}
        return replace(found, **own, frames=frames, fps=[8.0], inputs=inputs)

    def run(backbone: Any, plan: Any, steps: int = 2, frames: int = 1) -> list[float]:
        module = module_of(recipe(steps), backbone, plan)
        chosen = module.configure_optimizers()
        optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
        losses = []
        for step in range(steps):
            optimizer.zero_grad()
            with warnings.catch_warnings():  # there is no `Trainer` to log to
                warnings.filterwarnings("ignore", message=".*`self.log")
                loss = module.training_step(batch(backbone, step, frames), step)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        return losses

    return run


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(THREADS)
