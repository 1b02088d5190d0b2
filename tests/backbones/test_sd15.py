"""The U-Net of Stable Diffusion 1.5 at its full size, with random weights: plan, two steps, adapter
and back."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from trainer.__main__ import main

DATA = Path(__file__).parents[2] / "data" / "tiny"
BLOCKS = (320, 640, 1280, 1280)
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": BLOCKS,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TEXT: dict[str, Any] = {  # openai/clip-vit-large-patch14, but for vocabulary and depth
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
VAE: dict[str, Any] = {  # a quarter as wide, since nothing of it trains
    "block_out_channels": (32, 64, 128, 128),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
PNDM: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
RUN = [
    "run.resolution=64",
    "run.precision=fast",
    "run.batch_size=2",
    "run.steps=2",
    "run.validate_every=0",
    "run.id=run",
    "preview.prompts=[]",
    "tracker=none",
]


def filled(model: Any) -> Any:
    """A model of the meta device with values: one block of random ones again and again, in a
    fraction of the time that a billion draws take; gains of norms are 1."""
    model.to_empty(device="cpu")
    block = torch.randn(4099, generator=torch.Generator().manual_seed(0)).half()  # a prime number
    for value in model.parameters():
        if value.ndim == 1:
            torch.nn.init.ones_(value)
        else:
            spread = value[0].numel() ** -0.5
            whole = (spread * block).repeat(-(-value.numel() // len(block)))
            value.data.copy_(whole[: value.numel()].view_as(value))
    return model


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The pipeline folder, 1.8 GB in fp16; the tokeniser is the shipped one with 77 places."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("sd15")
    tokenizer = CLIPTokenizer.from_pretrained(DATA / "tokenizer", model_max_length=77)
    tokenizer.save_pretrained(folder / "tokenizer")
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **TEXT, **special))
        vae, unet = AutoencoderKL(**VAE), UNet2DConditionModel(**UNET)
    for part, model in {"text_encoder": text, "vae": vae, "unet": unet}.items():
        filled(model.half()).save_pretrained(folder / part)
        del model
    PNDMScheduler(**PNDM).save_pretrained(folder / "scheduler")
    index = json.loads((DATA / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
def test_the_plan_counts_cross_k_and_v(sd15: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=custom_diffusion", f"backbone={sd15}", "plan=true", "run.precision=fast"]
    words.append("data.class_word=animal")
    assert main(["check", *words]) == 0
    shown = capsys.readouterr().out
    selective = next(line for line in shown.splitlines() if "selective" in line)
    assert "19,169,280" in selective
    assert "16" in selective.split()
    assert f"trains {19_169_280 + 768:,} of" in shown
    assert "peak memory about" in shown


@pytest.mark.slow
def test_two_steps_saved_and_reloaded(sd15: Path, tmp_path: Path) -> None:
    from trainer.config.load import load_recipe
    from trainer.diffusion.sampler import sample
    from trainer.diffusion.sampling_settings import Sampling
    from trainer.runs.adapter import load_adapted
    from trainer.training.fit import fit

    # painted at 512x512 the class images alone would take minutes
    classes = tmp_path / "classes"
    classes.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 120, 200)).save(classes / f"{number}.png")
    words = [f"backbone={sd15}", f"data.prior_folder={classes}", f"run.out={tmp_path}"]
    words.append("data.class_word=animal")
    recipe = load_recipe(["recipe=custom_diffusion", *words, *RUN])
    folder = fit(recipe)
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    assert sum(value.numel() for value in tensors.values()) == 19_169_280 + 768
    assert path.stat().st_size <= 1.2 * sum(value.nbytes for value in tensors.values())

    gc.collect()  # the model that was trained
    loaded, _ = load_adapted(path)
    parameters = dict(loaded.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in tensors.items())
    settings = Sampling(steps=1, size=(64, 64))
    picture = sample(loaded, ["a <v1> animal"], [1], settings=settings)
    assert bool(picture.isfinite().all()) and float(picture.std()) > 0

    # every tensor has moved away from the base's
    start = load_file(sd15 / "unet" / "diffusion_pytorch_model.safetensors")
    trained = {name.removeprefix("unet."): value for name, value in tensors.items()}
    known = trained.keys() & start.keys()
    assert len(known) == 32
    assert not any(torch.equal(trained[name], start[name].float()) for name in known)
