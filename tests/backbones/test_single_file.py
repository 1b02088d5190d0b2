"""Checkpoints in one file: read equal to the parts they were written of and to diffusers' own
loader; which kind one is, what it does not hold, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from original_layout import tensors_of, write_checkpoint
from safetensors.torch import save_file
from sdxl_folder import DATA, TEXT, stock_pipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainer.__main__ import main
from trainer.backbones import load_backbone
from trainer.backbones.part_digests import part_digests
from trainer.backbones.prompt_tokens import prompt_length, prompt_reader
from trainer.backbones.single_file import FIRST, LAYOUTS, is_checkpoint, read_single_file
from trainer.backbones.spec import PartsSpec
from trainer.config.lineage import backbone_spec
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.runs.adapter import load_adapted

KINDS = ("sd15", "sd21", "sdxl")
CLOSE = 2 / 255


def tiny_vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return AutoencoderKL(
            block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8,
            latent_channels=4, sample_size=32, down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
        ).eval()  # fmt: skip


def tiny_sd(open_clip: bool) -> Any:
    tokenizer = CLIPTokenizer.from_pretrained(DATA / "tokenizer")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    act = "gelu" if open_clip else "quick_gelu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = TEXT | ids | {"vocab_size": len(tokenizer), "hidden_act": act}
        text = CLIPTextModel(CLIPTextConfig(**config, hidden_size=32))
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=32, attention_head_dim=2, use_linear_projection=open_clip,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        tiny_vae(), text.eval(), tokenizer, unet.eval(), scheduler, None, None, None, False
    )


def made(kind: str) -> Any:
    if kind == "sdxl":
        return stock_pipeline(vae=tiny_vae(), in_channels=4, out_channels=4)
    return tiny_sd(kind == "sd21")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Any]]:
    """By kind a checkpoint, a folder of its configurations and tokenizers, and the parts."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        pipe = made(kind)
        pipe.save_pretrained(folder / "config")
        for weights in (folder / "config").glob("*/*.safetensors"):
            weights.unlink()
        said = {"modelspec.prediction_type": "epsilon"} if kind == "sd21" else None
        file = write_checkpoint(
            pipe, folder / "my.safetensors", open_clip=kind == "sd21", metadata=said
        )
        found[kind] = (file, folder / "config", pipe)
    return found


def loaded(file: Path, config: Path | None, **parts: Any) -> Any:
    given = PartsSpec(config=None if config is None else str(config), **parts)
    return load_backbone(backbone_spec(str(file), None, given), "x").eval()


def painted(pipe: Any) -> Tensor:
    x_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    pictures: Tensor = pipe(
        ["a fox"], latents=x_t, num_inference_steps=3, guidance_scale=4.0, output_type="pt",
        height=32, width=32,
    ).images  # fmt: skip
    return pictures


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_read_as_it_was_written(kind: str, written: Any) -> None:
    file, config, pipe = written[kind]
    model = loaded(file, config)
    for part in ("unet", "vae", *model.text_encoders):
        own, wanted = getattr(model, part).state_dict(), getattr(pipe, part).state_dict()
        assert own.keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(own[name], value.half().float()), f"{part}.{name}"
            assert own[name].dtype == torch.float32 and not own[name].is_meta
    assert model.published == torch.float16
    assert model.family == ("sdxl" if kind == "sdxl" else "sd")
    assert not any(value.is_meta for value in model.buffers())


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_pictures_are_those_of_diffusers_own_loader(kind: str, written: Any) -> None:
    file, config, _ = written[kind]
    stock: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipe = stock.from_single_file(str(file), config=str(config), local_files_only=True)
    pipe.watermark = None
    model = loaded(file, config)
    pipe.scheduler = model.scheduler()
    how = Sampling(3, 4.0, size=(32, 32))
    own = sample(model, ["a fox"], [3], settings=how) / 2 + 0.5
    assert float((own - painted(pipe)).abs().max()) <= CLOSE


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("sd15", {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}),
        ("sd21", {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}),
        ("sd21_base", {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684, "vae": 83_653_863,
                "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
            },
        ),
    ],
)  # fmt: skip
def test_the_shipped_configurations_are_those_of_the_models(
    layout: str, counts: dict[str, int]
) -> None:
    """By the published numbers of parameters, of which each is wrong for another configuration."""
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    kinds["text_encoder_2"] = CLIPTextModelWithProjection
    for part, wanted in counts.items():
        config = json.loads((LAYOUTS / layout / part / "config.json").read_text())
        kind: Any = kinds[part]
        with torch.device("meta"):
            model = (
                kind(kind.config_class.from_dict(config))
                if part.startswith("text")
                else kind.from_config(config)
            )
        assert sum(value.numel() for value in model.parameters()) == wanted, part


def stub(path: Path, *names: str, channels: int = 4, metadata: Any = None) -> Path:
    """A file with the names of a checkpoint alone."""
    tensors = {name: torch.zeros(1) for name in names}
    save_file(tensors | {FIRST: torch.zeros(1, channels, 1, 1)}, path, metadata)
    return path


CLIP_1 = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
CLIP_2 = "cond_stage_model.model.ln_final.bias"
XL = ("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")


def test_the_kind_is_known_by_the_names(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    said = {"modelspec.prediction_type": "v"}
    cases: list[tuple[tuple[str, ...], Any, str, dict[str, Any]]] = [
        ((CLIP_1,), None, "sd15", {}),
        ((CLIP_2,), said, "sd21", {"prediction_type": "v_prediction"}),
        (
            (CLIP_2,), {"modelspec.prediction_type": "epsilon"}, "sd21_base",
            {"prediction_type": "epsilon"},
        ),
        (XL, None, "sdxl", {}),
        (
            (*XL, "v_pred", "ztsnr"), None, "sdxl",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
    ]  # fmt: skip
    for names, metadata, layout, scheduler in cases:
        file.unlink(missing_ok=True)
        found = read_single_file(stub(file, *names, metadata=metadata))
        assert (found.layout, dict(found.scheduler)) == (layout, scheduler)
        assert is_checkpoint(file)
    wide = {"model.diffusion_model.x.attn2.to_k.weight": torch.zeros(1, 2048)}
    save_file(wide | {FIRST: torch.zeros(1, 4, 1, 1)}, file)
    assert read_single_file(file).layout == "sdxl"


@pytest.mark.parametrize("width", [None, 640])
def test_a_kind_is_not_guessed(width: int | None, tmp_path: Path) -> None:
    """Of a network alone, whose text is none of a known width; whoever knows its kind says so."""
    key = "model.diffusion_model.x.attn2.to_k.weight"
    tensors = {} if width is None else {key: torch.zeros(1, width)}
    file = tmp_path / "a.safetensors"
    save_file(tensors | {FIRST: torch.zeros(1, 4, 1, 1)}, file)
    reads = "reads no text" if width is None else "reads text of width 640"
    with pytest.raises(RecipeError, match=f"its network {reads}, as none of .*; give parts.config"):
        backbone_spec(str(file))
    assert read_single_file(file, "mine").layout == "mine"


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        ((CLIP_1,), 9, "takes 9 channels, of a picture or a mask beside the noise"),
        (("conditioner.embedders.0.model.x",), 4, "the refiner of SDXL, which is not trained"),
        ((*XL, "edm_mean"), 4, "trained on EDM's noise levels"),
        ((CLIP_2,), 4, "does not say what it predicts; give parts.config=sd21 for 768 pixels"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    names: tuple[str, ...], channels: int, message: str, tmp_path: Path
) -> None:
    file = stub(tmp_path / "a.safetensors", *names, channels=channels)
    with pytest.raises(RecipeError, match=message):
        backbone_spec(str(file))


def test_v_of_a_file_is_what_trains(written: Any, tmp_path: Path) -> None:
    _, config, pipe = written["sdxl"]
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    file = write_checkpoint(pipe, tmp_path / "v.safetensors", add=marks)
    model = loaded(file, config)
    assert model.target == "v"
    assert model.alphas_cumprod is not None and float(model.alphas_cumprod[-1]) == 0


@pytest.mark.parametrize("place", ["given", "beside"])
def test_the_vocabulary_comes_from_a_folder(
    place: str, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the layouts that ship have none; the second tokenizer pads with `!` all the same."""
    file, config, pipe = written["sdxl"]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    bare, own = tmp_path / "layout", tmp_path / "my.safetensors"
    shutil.copytree(config, bare)
    shutil.copy(file, own)
    for part in ("tokenizer", "tokenizer_2"):
        (bare / part / "tokenizer.json").unlink()
    message = r"no vocabulary of CLIP.* is there; .*give parts\.tokenizer=<folder>"
    with pytest.raises(RecipeError, match=message):
        loaded(own, bare)
    if place == "given":
        model = loaded(own, bare, tokenizer=str(DATA))
    else:
        shutil.copytree(DATA / "tokenizer", tmp_path / "tokenizer")
        model = loaded(own, bare)
    texts = ["a fox on a red background", "Two cats, left of a tree!"]
    for mine, theirs in (
        (model.tokenizer, pipe.tokenizer), (model.tokenizer_2, pipe.tokenizer_2)
    ):  # fmt: skip
        padded = {"padding": "max_length", "max_length": 32}
        assert mine(texts, **padded).input_ids == theirs(texts, **padded).input_ids


def test_the_cache_of_the_hub_has_a_vocabulary(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--openai--clip" / "snapshots" / "1234"
    shutil.copytree(DATA / "tokenizer", snapshot)
    file = stub(tmp_path / "a.safetensors", *XL, "first_stage_model.x")
    spec = backbone_spec(str(file))
    assert (spec.family, spec.folder) == ("sdxl", str(LAYOUTS / "sdxl"))
    assert prompt_length(spec) == 77
    reader = prompt_reader(spec)
    assert reader is not None and len(reader.ids("a fox")) == 2 and reader.chunk == 75


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_in_the_cache_is_written_anew(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges that were cut would read every prompt as other tokens, and say nothing."""
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--openai--clip" / "snapshots" / "1234"
    shutil.copytree(DATA / "tokenizer", snapshot)
    file = stub(tmp_path / "a.safetensors", *XL, "first_stage_model.x")
    backbone_spec(str(file))
    kept = sorted((tmp_path / "cache" / "tokenizers").rglob(name))
    before = [path.read_bytes() for path in kept]
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:-40])
    backbone_spec(str(file))
    assert [path.read_bytes() for path in kept] == before


def test_parts_that_the_file_lacks(written: Any, tmp_path: Path) -> None:
    _, config, pipe = written["sdxl"]
    file = write_checkpoint(pipe, tmp_path / "a.safetensors", without=["first_stage_model."])
    with pytest.raises(RecipeError, match=r"it holds no vae; give parts\.vae=<folder>"):
        loaded(file, config)
    pipe.vae.save_pretrained(tmp_path / "vae")
    model = loaded(file, config, vae=str(tmp_path / "vae"))
    assert torch.equal(model.vae.decoder.conv_in.weight, pipe.vae.decoder.conv_in.weight)
    spec = backbone_spec(str(file), None, PartsSpec(config=str(config), vae=str(tmp_path / "vae")))
    assert {"file", "vae", "unet"} <= part_digests(spec).keys()


def test_a_file_that_does_not_fit_is_refused(written: Any, tmp_path: Path) -> None:
    _, config, pipe = written["sd15"]
    part = "model.diffusion_model.middle_block.0.in_layers.0.weight"
    assert part in tensors_of(pipe)
    file = write_checkpoint(pipe, tmp_path / "a.safetensors", without=[part])
    with pytest.raises(ValueError, match=r"its unet lacks mid_block\.resnets\.0\.norm1\.weight, 1"):
        loaded(file, config)
    name = "model.diffusion_model.time_embed.0.bias"
    tall = {name: tensors_of(pipe)[name].half()[:, None].contiguous()}
    file = write_checkpoint(pipe, tmp_path / "c.safetensors", add=tall)
    with pytest.raises(ValueError, match=r"bias of its unet is \[64, 1\], .* says \[64\]"):
        loaded(file, config)
    wide = tmp_path / "wide"
    shutil.copytree(config, wide)
    changed = json.loads((wide / "unet" / "config.json").read_text()) | {"attention_head_dim": 4}
    changed["block_out_channels"] = [16, 48]
    (wide / "unet" / "config.json").write_text(json.dumps(changed))
    whole = write_checkpoint(pipe, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"of its unet is \[.*\], and the configuration says \["):
        loaded(whole, wide)


def test_other_files_are_no_checkpoints(tmp_path: Path, written: Any) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"pickle")
    with pytest.raises(RecipeError, match="pickles are never loaded; take the checkpoint as"):
        backbone_spec(str(tmp_path / "a.ckpt"))
    save_file({"lora_unet_x.alpha": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(RecipeError, match="not an adapter of ours"):
        backbone_spec(str(tmp_path / "lora.safetensors"))
    file, _, _ = written["sdxl"]
    with pytest.raises(RecipeError, match=r"parts\.config=sd99: neither one of sd15, sd21"):
        backbone_spec(str(file), None, PartsSpec(config="sd99"))
    with pytest.raises(RecipeError, match=r"parts\.config=sd15 is for a checkpoint in one file"):
        backbone_spec("tiny", None, PartsSpec(config="sd15"))


def test_a_recipe_is_checked_without_torch(written: Any) -> None:
    file, config, _ = written["sdxl"]
    words = ["recipe=lora", f"backbone={file}", f"parts.config={config}", "data.prior_weight=0"]
    code = (
        "import sys; from trainer.config.load import load_recipe\n"
        f"load_recipe({words})\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.strip() == "set()"


def test_a_run_on_a_file_is_found_again(written: Any, tmp_path: Path) -> None:
    """The adapter's recipe names the file and the parts; it is sampled and exported from there."""
    file, config, _ = written["sdxl"]
    words = [f"backbone={file}", f"parts.config={config}", "data.prior_weight=0", "run.steps=2"]
    words += ["run.resolution=32", "run.batch_size=2", "preview.prompts=[]", "tracker=none"]
    words += [f"run.out={tmp_path}", "run.id=a", "run.validate_every=0", "data.augment=false"]
    assert main(["fit", "recipe=lora", *words]) == 0
    adapter = tmp_path / "lora" / "a" / "adapter.safetensors"
    model, tree = load_adapted(adapter)
    assert model.family == "sdxl" and tree["parts"]["config"] == str(config)
    assert main(["export", f"adapter={adapter}", "format=kohya", f"out={tmp_path / 'k'}"]) == 0
    whole = tmp_path / "whole"
    assert main(["export", f"adapter={adapter}", "format=merged", f"out={whole}"]) == 0
    assert backbone_spec(str(whole)).family == "sdxl" and (whole / "tokenizer_2").is_dir()
    again = backbone_spec(str(adapter))
    assert again.file == str(file) and again.adapters == (str(adapter),)
    with pytest.raises(RecipeError, match="is the result of a run, and has the parts of that run"):
        backbone_spec(str(adapter), None, PartsSpec(vae="x"))


@pytest.mark.parametrize("whole", [True, False])
def test_a_part_of_a_folder_is_replaced(whole: bool, tiny_folder: Path, tmp_path: Path) -> None:
    """By a folder of the part, or by that of a pipeline."""
    other = tmp_path / "other"
    shutil.copytree(tiny_folder / "vae", other / "vae")
    vae = AutoencoderKL.from_pretrained(other / "vae")
    with torch.no_grad():
        vae.decoder.conv_in.weight.add_(1)
    vae.save_pretrained(other / "vae")
    given = PartsSpec(vae=str(other if whole else other / "vae"))
    spec = backbone_spec(str(tiny_folder), None, given)
    model, plain = load_backbone(spec, "x"), load_backbone(backbone_spec(str(tiny_folder)), "x")
    assert torch.equal(model.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight.float())
    assert not torch.equal(model.vae.decoder.conv_in.weight, plain.vae.decoder.conv_in.weight)
    assert torch.equal(model.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert part_digests(spec)["vae"] != part_digests(backbone_spec(str(tiny_folder)))["vae"]


def test_a_part_that_is_not_there_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    for given, message in (
        ({"vae": str(tmp_path)}, r"parts\.vae=.*: neither a folder of vae nor of a pipeline"),
        ({"text_encoder_2": str(tmp_path)}, r"parts\.text_encoder_2: backbone .* has no such part"),
    ):
        with pytest.raises(RecipeError, match=message):
            backbone_spec(str(tiny_folder), None, PartsSpec(**given))
