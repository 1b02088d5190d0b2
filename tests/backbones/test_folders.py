"""Pipeline folders as they are found: variants, shards, other VAEs, tokenizers without a length;
and what is refused before torch is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edited import edit
from safetensors.torch import load_file, save_file

from trainer.backbones.prompt_tokens import prompt_length
from trainer.backbones.vae import scale_latents, unscale_latents
from trainer.backbones.weight_files import weight_files
from trainer.config.lineage import backbone_spec
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling

Open = Callable[[Path], Any]
WEIGHTS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"
}  # fmt: skip


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def as_variant(folder: Path, variant: str, keep: bool = False) -> None:
    """Stores all weights of a folder in half precision, under the variant's names."""
    for part, stem in WEIGHTS.items():
        plain = folder / part / f"{stem}.safetensors"
        halves = {key: value.half() for key, value in load_file(plain).items()}
        save_file(halves, folder / part / f"{stem}.{variant}.safetensors", {"format": "pt"})
        if not keep:
            plain.unlink()


def as_shards(folder: Path, model: Any) -> None:
    """Stores the networks of a model as several files and an index."""
    for part, stem in WEIGHTS.items():
        (folder / part / f"{stem}.safetensors").unlink()
        getattr(model, part).save_pretrained(folder / part, max_shard_size="100KB")
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.allclose(x, y, rtol=0, atol=tolerance) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("variant", ["fp16", "bf16", "non_ema"])
def test_a_folder_of_a_variant_alone_is_loaded(
    variant: str, copy: Path, tiny: Any, open_folder: Open
) -> None:
    as_variant(copy, variant)
    loaded = open_folder(copy)
    assert same(loaded, tiny, tolerance=2e-3)
    assert loaded.published == torch.float16
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_plain_weights_come_before_a_variant(copy: Path, tiny: Any, open_folder: Open) -> None:
    as_variant(copy, "fp16", keep=True)
    assert same(open_folder(copy), tiny)


def test_shards_are_loaded_and_exported(
    copy: Path, tiny: Any, open_folder: Open, save_trained_on: Callable[..., Path], tmp_path: Path
) -> None:
    from trainer.export.export import export

    as_shards(copy, tiny)
    assert same(open_folder(copy), tiny)
    assert len(weight_files(copy / "unet").files) > 1
    path = save_trained_on(copy, {"lora": {"sites": "cross", "rank": 2}})
    for name in ("merged", "kohya"):
        export(path, tmp_path / name, name, say=lambda line: None)


def test_a_variant_is_exported(
    copy: Path, save_trained_on: Callable[..., Path], tmp_path: Path
) -> None:
    from trainer.export.export import export

    as_variant(copy, "fp16")
    path = save_trained_on(copy, {"lora": {"sites": "cross", "rank": 2}})
    for name in ("merged", "diffusers"):
        export(path, tmp_path / name, name, say=lambda line: None)


def _lacks_a_shard(folder: Path, model: Any) -> None:
    as_shards(folder, model)
    sorted((folder / "unet").glob("*-of-*.safetensors"))[1].unlink()


def _lacks_the_index(folder: Path, model: Any) -> None:
    as_shards(folder, model)
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()


def _pickled(folder: Path, model: Any) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "x.bin")


def _misnamed(folder: Path, model: Any) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").rename(
        folder / "vae" / "my_vae.safetensors"
    )


def unet(**changes: Any) -> Callable[[Path, Any], None]:
    return lambda folder, model: edit(folder / "unet" / "config.json", **changes)


REFUSED: dict[str, tuple[Callable[[Path, Any], None], str]] = {
    "shard": (_lacks_a_shard, r"unet: diffusion_pytorch_model-00002-of-\d+.*shards, is missing"),
    "index": (_lacks_the_index, r"is a shard, and the index that names all shards.*is missing"),
    "pickle": (_pickled, r"no safetensors file \(found x\.bin; pickles are never loaded\)"),
    "name": (_misnamed, r"my_vae\.safetensors is not named as weights are"),
    "inpainting": (unet(in_channels=17), "takes 17 channels, a mask .* it is an inpainting model"),
    "edit": (unet(in_channels=16), "takes 16 channels, a picture to edit .*InstructPix2Pix"),
    "depth": (unet(in_channels=9), "takes 9 channels, a depth map beside the noise"),
    "channels": (unet(in_channels=4), "takes 4 channels, and the latents of its VAE have 8"),
    "width": (unet(cross_attention_dim=768), "reads text of width 768, .*gives 128"),
    "sdxl": (unet(addition_embed_type="text_time"), r"\(addition_embed_type=text_time: pooled"),
    "classes": (unet(num_class_embeds=10), "asks for more than text"),
    "vae": (
        lambda folder, model: edit(folder / "vae" / "config.json", _class_name="VQModel"),
        "vae is a VQModel; these are known: AutoencoderKL",
    ),
    "text": (
        lambda folder, model: edit(
            folder / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]
        ),
        "text_encoder is a T5EncoderModel of transformers; this family has CLIPTextModel",
    ),
    "scheduler": (
        lambda folder, model: edit(
            folder / "scheduler" / "scheduler_config.json", prediction_type="noise"
        ),
        "prediction_type is 'noise'",
    ),
    "part": (
        lambda folder, model: shutil.rmtree(folder / "vae"), r"vae: config\.json is missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_it_is_loaded(
    case: str, copy: Path, tiny: Any
) -> None:
    spoil, message = REFUSED[case]
    spoil(copy, tiny)
    with pytest.raises(RecipeError, match=message):
        backbone_spec(str(copy))


def test_the_check_of_a_folder_imports_no_torch(copy: Path) -> None:
    edit(copy / "unet" / "config.json", in_channels=17)
    code = (
        "import sys\nfrom trainer.__main__ import main\n"
        f"print(main(['check', 'recipe=lora', 'backbone={copy}']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert "it is an inpainting model" in done.stderr


@pytest.mark.parametrize("named_in", ["config", "index"])
def test_a_tiny_autoencoder_is_loaded_by_its_class(
    named_in: str, copy: Path, open_folder: Open, tmp_path: Path
) -> None:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        latent_channels=8,
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.5,
    )  # fmt: skip
    shutil.rmtree(copy / "vae")
    vae.save_pretrained(copy / "vae")
    if named_in == "index":
        config = json.loads((copy / "vae" / "config.json").read_text())
        del config["_class_name"]
        (copy / "vae" / "config.json").write_text(json.dumps(config))
    edit(copy / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    loaded = open_folder(copy)
    assert type(loaded.vae) is AutoencoderTiny and loaded.divisor == 4
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = loaded.latents(loaded.moments(pixels), torch.zeros(2, 8, 8, 8))
    torch.testing.assert_close(latents, vae.encode(pixels).latents * 0.5)
    torch.testing.assert_close(
        loaded.decode(latents), vae.decode(latents / 0.5).sample.clamp(-1, 1), rtol=0, atol=1e-5
    )
    picture = sample(loaded, ["a fox"], [0], settings=Sampling(steps=1))
    assert picture.shape == (1, 3, 32, 32)
    loaded.pipeline().save_pretrained(tmp_path / "again")
    assert type(open_folder(tmp_path / "again").vae) is AutoencoderTiny


def test_scaling_and_shift_are_those_of_the_config(tiny: Any) -> None:
    tiny.vae.register_to_config(scaling_factor=0.25, shift_factor=0.5)
    z = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(scale_latents(tiny.vae, z), (z - 0.5) * 0.25)
    torch.testing.assert_close(unscale_latents(tiny.vae, scale_latents(tiny.vae, z)), z)
    moments = torch.cat([z, torch.full_like(z, -30.0)], dim=1)
    torch.testing.assert_close(tiny.latents(moments, torch.zeros_like(z)), (z - 0.5) * 0.25)


@pytest.mark.parametrize("length", [None, 77, 10**30, 1e30, 8, "8", "many", 0, -1])
def test_a_tokenizer_has_no_more_tokens_than_the_encoder_has_positions(
    length: int | float | str | None, copy: Path, open_folder: Open
) -> None:
    """The shipped text encoder has 32 positions."""
    path = copy / "tokenizer" / "tokenizer_config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "max_length"}
    config.pop("model_max_length")
    path.write_text(json.dumps(config if length is None else config | {"model_max_length": length}))
    loaded = open_folder(copy)
    wanted = 8 if length in (8, "8") else 32
    assert prompt_length(backbone_spec(str(copy))) == wanted
    assert loaded.text_length == loaded.tokenizer.model_max_length == wanted
    condition = loaded.encode_prompts(["a fox " * 40, "a cat"])
    assert condition.tokens.shape == (2, wanted, 128)
