"""Pipeline folders that cannot be read as they are: one error each, which names the file and what
mends it, before torch is imported where the files say so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edited import edit
from safetensors.torch import load_file, save_file

from trainer.backbones import load_backbone
from trainer.backbones.pipeline_folder import without_values
from trainer.config.lineage import backbone_spec
from trainer.config.schema import RecipeError

Spoil = Callable[[Path], Any]
INDEX, WEIGHTS = "model_index.json", "diffusion_pytorch_model.safetensors"
JSON = (
    INDEX, "unet/config.json", "text_encoder/config.json", "vae/config.json",
    "scheduler/scheduler_config.json",
)  # fmt: skip
NEWER = r"it was saved by diffusers 99\.1, and .* is installed, .* saved by an older one"


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def put(file: str, **changes: Any) -> Spoil:
    return lambda folder: edit(folder / file, **changes)


def text(file: str, content: str) -> Spoil:
    return lambda folder: (folder / file).write_text(content)


def cut(file: str) -> Spoil:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-9])


def without(part: str) -> Spoil:
    return lambda folder: shutil.rmtree(folder / part)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("StableDiffusionControlNetPipeline", "a control picture through a ControlNet"),
        ("StableDiffusionInstructPix2PixPipeline", "takes a picture to edit beside the noise"),
        ("StableDiffusionDepth2ImgPipeline", "takes a depth map beside the noise"),
    ],
)
def test_a_pipeline_whose_denoiser_takes_more_than_noise_is_refused_by_name(
    kind: str, says: str, copy: Path
) -> None:
    """Those of Text2Video-Zero's other forms, and Pix2Video's own backbone."""
    edit(copy / INDEX, _class_name=kind)
    wanted = rf"is a {kind}, .* {says}; only models that take noise alone .* text-to-image version"
    with pytest.raises(RecipeError, match=wanted):
        backbone_spec(str(copy))


@pytest.mark.parametrize("file", JSON)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<html>no such page</html>", r"it is no JSON \(Expecting value.*\); download it again"),
        ("", "it is no JSON"),
        ("[1, 2]", r"it holds no JSON object, as in \{\.\.\.\}; download it again"),
        ("null", "it holds no JSON object"),
        ('{"a":' + "[" * 100_000, "it is no JSON"),
    ],
    ids=["page", "empty", "list", "null", "deep"],
)
def test_a_file_that_is_no_json_object(file: str, content: str, says: str, copy: Path) -> None:
    text(file, content)(copy)
    with pytest.raises(RecipeError, match=f"{file}: .*{says}"):
        backbone_spec(str(copy))


UNFIT: dict[str, tuple[Spoil, str]] = {
    "no-family": (
        put(INDEX, _class_name="KolorsPipeline"),
        "is a KolorsPipeline; there is no family for it; choose one of ChromaImg2ImgPipeline",
    ),
    "own-code": (
        put(INDEX, _class_name=["my_code", "MyPipeline"]),
        r"is a \['my_code', 'MyPipeline'\]; there is no family for it; choose one of Chroma",
    ),
    "no-pipeline": (text(INDEX, "{}"), "it names no pipeline, under _class_name; take"),
    "part": (
        put(INDEX, text_encoder="CLIPTextModel"),
        r"text_encoder is 'CLIPTextModel'; a part is named by its library and its class, as",
    ),
    "other-parts": (put(INDEX, _class_name="WanPipeline"), r"transformer: config\.json is missing"),
    "no-text": (
        without("text_encoder"),
        r"text_encoder: config\.json is missing; .*download it again, or give parts\.text_encoder=",
    ),
    "no-text-named": (
        lambda folder: [
            each(folder)
            for each in (without("text_encoder"), put(INDEX, text_encoder=[None, None]))
        ],
        r"text_encoder: config\.json is missing; .*parts\.text_encoder=<folder>",
    ),
    "no-denoiser": (without("unet"), r"unet: config\.json is missing; .*parts\.denoiser=<folder>"),
    "no-scheduler": (without("scheduler"), r"is missing; the folder .* so download it again$"),
    "pickle": (
        lambda folder: (folder / "unet" / WEIGHTS).rename(folder / "unet" / "weights.bin"),
        r"\(found weights\.bin; pickles are never loaded\); save the pipeline with safe_seria",
    ),
    "no-weights": (
        lambda folder: (folder / "vae" / WEIGHTS).unlink(),
        "vae: no safetensors file; download the part again, with its weights",
    ),
    "edm": (
        put("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"),
        "a EDMEulerScheduler, of a model that was trained on EDM's noise levels",
    ),
    "cut": (cut(f"unet/{WEIGHTS}"), f"{WEIGHTS}: its safetensors file is damaged: .*again"),
    "cut-text": (cut("text_encoder/model.safetensors"), "model.safetensors: its safetensors"),
    "pointer": (
        text(f"vae/{WEIGHTS}", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        f"vae/{WEIGHTS}: it is a pointer of Git LFS .*run `git lfs pull` in the folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_the_files_say_is_said_before_torch(case: str, copy: Path) -> None:
    spoil, says = UNFIT[case]
    spoil(copy)
    with pytest.raises(RecipeError, match=says):
        backbone_spec(str(copy))


def newer(part: str, **changes: Any) -> Spoil:
    return put(f"{part}/config.json", _diffusers_version="99.1", **changes)


LOADED: dict[str, tuple[Spoil, str]] = {
    "class": (
        put("unet/config.json", _class_name="UNet3DConditionModel"),
        "unet: its config.json is of a UNet3DConditionModel, and this family has a "
        "UNet2DConditionModel; take the part that belongs to this pipeline",
    ),
    "newer-class": (newer("unet", _class_name="UNet9"), f"is of a UNet9, .*; {NEWER}"),
    "newer-option": (newer("vae", new_norm="rms"), rf"vae: its config\.json has new_norm; {NEWER}"),
    "newer-block": (newer("unet", down_block_types=["New", "New"]), f"unet: no UNet2D.*; {NEWER}"),
    "no-block": (
        put("unet/config.json", down_block_types=["New", "New"]),
        r"unet: no UNet2DConditionModel can be made of its config\.json \(.*; download",
    ),
    "word": (put("unet/config.json", layers_per_block="two"), "unet: no UNet2DCondition"),
    "text": (put("text_encoder/config.json", hidden_act="new"), "text_encoder: no CLIPText"),
    "tokenizer": (
        text("tokenizer/tokenizer.json", "{broken"),
        r"/tokenizer: the files of the tokenizer cannot be read \(.*\); download them again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADED)
def test_what_a_config_asks_for_is_said_without_the_weights(case: str, copy: Path) -> None:
    spoil, says = LOADED[case]
    spoil(copy)
    with without_values(), pytest.raises(ValueError, match=says):
        load_backbone(backbone_spec(str(copy)), "mine")


def test_what_a_newer_diffusers_has_added_and_left_off_is_loaded(copy: Path) -> None:
    newer("unet", new_norm=None, new_gate=False)(copy)
    with without_values():
        assert load_backbone(backbone_spec(str(copy)), "mine").family == "sd"


@pytest.mark.parametrize(
    ("part", "option", "says"),
    [
        ("text_encoder", {"intermediate_size": 99}, r"fc1\.\w+ is \(.*\) in the weights and \(99"),
        (
            "text_encoder",
            {"num_hidden_layers": 9},
            "the weights lack .* download the part again",
        ),
        ("unet", {"block_out_channels": [64, 64]}, "no UNet2DCondition.* expected shape"),
    ],
)
def test_weights_of_another_config_are_refused(
    part: str, option: dict[str, Any], says: str, copy: Path
) -> None:
    put(f"{part}/config.json", **option)(copy)
    with pytest.raises(ValueError, match=f"{part}: .*{says}"):
        load_backbone(backbone_spec(str(copy)), "mine")


def lacking(part: str) -> Spoil:
    """Its last weight left out, as of a file that was filtered."""

    def spoil(folder: Path) -> None:
        path = folder / part / WEIGHTS
        tensors = load_file(path)
        del tensors[max(tensors)]
        save_file(tensors, path, {"format": "pt"})

    return spoil


@pytest.mark.parametrize(
    ("part", "spoil"),
    [
        ("unet", lacking("unet")),
        ("vae", lacking("vae")),
        ("unet", put("unet/config.json", block_out_channels=[64, 64])),
        ("unet", put("unet/config.json", layers_per_block=3)),
    ],
)
def test_weights_that_are_lacking_are_missed_without_reading_one(
    part: str, spoil: Spoil, copy: Path
) -> None:
    """So that `check` refuses what `fit` would."""
    spoil(copy)
    says = f"{part}: the weights lack one of the shape .*config.json; download the part again"
    with without_values(), pytest.raises(ValueError, match=says):
        load_backbone(backbone_spec(str(copy)), "mine")
    with pytest.raises(ValueError, match=part):
        load_backbone(backbone_spec(str(copy)), "mine")


def test_a_repository_of_the_hub_is_no_backbone_by_its_name() -> None:
    says = "backbone=someone/new-model: neither .* fetch it with `hf download someone/new-model --l"
    with pytest.raises(RecipeError, match=says):
        backbone_spec("someone/new-model")
