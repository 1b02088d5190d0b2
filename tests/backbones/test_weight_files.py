"""Which weights of a checkpoint of the hub are fetched: full precision where it is, else one
variant, with the real client and a hub on this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flow_folders import make_flow_folder, sd3_pipeline
from huggingface_hub import constants
from model_hub import COMMIT, REPOSITORY, hub
from safetensors.torch import load_file, save_file

from trainer.backbones import weights_here
from trainer.backbones.pipeline_folder import pipeline_folder, weights_to_fetch
from trainer.backbones.small_files import small_files
from trainer.backbones.spec import BackboneSpec

PARTS = ("unet", "text_encoder", "vae")
PLAIN = "diffusion_pytorch_model"
SHARDS = [f"{PLAIN}-0000{n}-of-00002.safetensors" for n in (1, 2)]
HALF_SHARDS = [f"{PLAIN}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX, HALF_INDEX = (f"{PLAIN}.safetensors.index{own}.json" for own in ("", ".fp16"))
CASES: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([f"{PLAIN}.safetensors", f"{PLAIN}.bin"], [f"{PLAIN}.safetensors"]),
    "both": (
        [f"{PLAIN}.fp16.safetensors", f"{PLAIN}.safetensors", f"{PLAIN}.non_ema.safetensors"],
        [f"{PLAIN}.safetensors"],
    ),
    "half alone": ([f"{PLAIN}.fp16.safetensors", f"{PLAIN}.bin"], [f"{PLAIN}.fp16.safetensors"]),
    "half and others": (
        [f"{PLAIN}.bf16.safetensors", f"{PLAIN}.fp16.safetensors", f"{PLAIN}.non_ema.safetensors"],
        [f"{PLAIN}.fp16.safetensors"],
    ),
    "another variant": ([f"{PLAIN}.non_ema.safetensors"], [f"{PLAIN}.non_ema.safetensors"]),
    "shards": ([*SHARDS, INDEX, f"{PLAIN}.fp16.safetensors"], [*SHARDS, INDEX]),
    "half shards": ([*HALF_SHARDS, HALF_INDEX], [*HALF_SHARDS, HALF_INDEX]),
    "shards beside the whole": (
        [*SHARDS, INDEX, f"{PLAIN}.safetensors"], [f"{PLAIN}.safetensors"]
    ),
    "shards of both": ([*SHARDS, INDEX, *HALF_SHARDS, HALF_INDEX], [*SHARDS, INDEX]),
    "transformers' names": (
        ["model-00001-of-00001.fp16.safetensors", "model.safetensors.index.fp16.json", "x.bin"],
        ["model-00001-of-00001.fp16.safetensors", "model.safetensors.index.fp16.json"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_weights_to_fetch(case: str) -> None:
    there, wanted = CASES[case]
    every = ["README.md", "v1.safetensors", *(f"unet/{name}" for name in there), "vae/x.json"]
    assert sorted(weights_to_fetch(every, ["unet", "vae"], hub="a/b")) == sorted(
        f"unet/{n}" for n in wanted
    )


@contextmanager
def connected(
    root: Path, cache: Path, patch: pytest.MonkeyPatch, **refusing: Any
) -> Iterator[list[str]]:
    """The hub's client, with a hub on this machine and a cache of its own."""
    with hub(root, **refusing) as (address, asked):
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield asked


def as_half(folder: Path, part: str, keep: bool) -> None:
    """Stores a part's weights as fp16, beside the plain ones or in their place."""
    (plain,) = (folder / part).glob("*.safetensors")
    halves = {key: value.half() for key, value in load_file(plain).items()}
    save_file(halves, plain.with_suffix(".fp16.safetensors"), {"format": "pt"})
    if not keep:
        plain.unlink()


def test_a_checkpoint_with_halves_alone_is_fetched_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text encoder has both; what would confuse a reader is not fetched at all."""
    root = Path(shutil.copytree(tiny_folder, tmp_path / "hub"))
    for part in PARTS:
        as_half(root, part, keep=part == "text_encoder")
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "config.json").write_text("{}")
    (root / "text_encoder" / "model.safetensors.index.fp16.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00001.fp16.safetensors"}})
    )
    (root / "text_encoder" / "pytorch_model.bin").write_bytes(b"x")
    spec = BackboneSpec(hub=REPOSITORY, revision=COMMIT)
    with connected(root, tmp_path / "cache", monkeypatch) as asked:
        folder = pipeline_folder(spec, "mine")
        fetched = sorted(name for name in asked if name.endswith((".safetensors", ".bin")))
        assert fetched == [
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors",
            "vae/diffusion_pytorch_model.fp16.safetensors",
        ]
        assert not [name for name in asked if "safety_checker" in name or ".index" in name]
        for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
            assert (folder.path / name).read_bytes() == (root / name).read_bytes()
        asked.clear()
        assert pipeline_folder(spec, "mine").path == folder.path
        assert asked == []
    # the hub is gone, and what was fetched stays
    assert pipeline_folder(spec, "mine").path == folder.path


def test_a_download_that_was_interrupted_is_finished(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    open_folder: Callable[..., Any],
) -> None:
    root = Path(shutil.copytree(tiny_folder, tmp_path / "hub"))
    for part in PARTS:
        as_half(root, part, keep=False)
    spec = BackboneSpec(hub=REPOSITORY, revision=COMMIT)
    with connected(root, tmp_path / "cache", monkeypatch) as asked:
        folder = pipeline_folder(spec, "mine").path
        (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
        asked.clear()
        assert pipeline_folder(spec, "mine").path == folder
        assert (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert next(open_folder(folder).parameters()).shape


def test_a_part_from_elsewhere_is_neither_fetched_nor_missed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are here without those of the part that is not read from the hub."""
    spec = BackboneSpec(hub=REPOSITORY, revision=COMMIT, parts={"vae": str(tiny_folder / "vae")})
    with connected(tiny_folder, tmp_path / "cache", monkeypatch) as asked:
        assert not weights_here(spec)
        folder = pipeline_folder(spec, "mine").path
    assert sorted(name for name in asked if name.endswith(".safetensors")) == [
        "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert weights_here(spec)
    assert pipeline_folder(spec, "mine").path == folder
    whole = BackboneSpec(hub=REPOSITORY, revision=COMMIT)
    assert not weights_here(whole), "its VAE is missing"
    made = whole.model_copy(update={"scratch": ("vae",)})
    assert weights_here(made)


def test_a_text_encoder_that_the_index_does_not_name_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_folder: Callable[..., Any]
) -> None:
    """Stable Diffusion 3 without T5, of which the repository even has a file."""
    root = make_flow_folder(tmp_path / "hub", sd3_pipeline, t5=False)
    shutil.copytree(root / "text_encoder", root / "text_encoder_3")
    spec = BackboneSpec(family="sd3", hub=REPOSITORY, revision=COMMIT)
    with connected(root, tmp_path / "cache", monkeypatch) as asked:
        folder = pipeline_folder(spec, "mine").path
        assert not [name for name in asked if name == "text_encoder_3/model.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert weights_here(spec)
    assert pipeline_folder(spec, "mine").path == folder
    assert list(open_folder(folder).text_encoders) == ["text_encoder", "text_encoder_2"]


def test_what_cannot_be_fetched_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    spec = BackboneSpec(hub="someone/else", revision=COMMIT)
    with (
        connected(tmp_path / "hub", tmp_path / "cache", monkeypatch),
        pytest.raises(ValueError, match=r"someone/else could not be fetched .* backbone=<folder>"),
    ):
        pipeline_folder(spec, "mine")


@pytest.mark.parametrize(
    ("code", "listed", "says"),
    [
        (
            "GatedRepo",
            True,
            f"it is gated: accept its terms at .*/{REPOSITORY} and log in with `hf",
        ),
        ("RepoNotFound", False, f"there is none at https://huggingface.co/{REPOSITORY}, or log in"),
        ("RevisionNotFound", False, f"it has no revision {COMMIT} any more"),
        ("ServerError", False, "see whether this machine has access to the hub"),
    ],
)
def test_why_nothing_can_be_fetched_is_said_with_its_mend(
    code: str, listed: bool, says: str, tiny_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spec = BackboneSpec(hub=REPOSITORY, revision=COMMIT)
    with connected(tiny_folder, tmp_path / "cache", monkeypatch, refuses=code, listed=listed):
        for fetch in (
            lambda: pipeline_folder(spec, "mine"),
            lambda: small_files(spec, "mine"),
        ):
            with pytest.raises(ValueError, match=rf"could not be fetched \(\w+\); {says}.*; or"):
                fetch()


def test_a_repository_of_pickles_alone_is_refused_before_anything_is_fetched(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(tiny_folder, tmp_path / "hub"))
    (root / "unet" / "diffusion_pytorch_model.safetensors").rename(
        root / "unet" / "diffusion_pytorch_model.bin"
    )
    spec = BackboneSpec(hub=REPOSITORY, revision=COMMIT)
    says = rf"{REPOSITORY}: unet has no safetensors file \(found diffusion_pytorch_model\.bin; pick"
    with connected(root, tmp_path / "cache", monkeypatch) as asked:
        with pytest.raises(ValueError, match=says):
            pipeline_folder(spec, "mine")
        assert asked == []
