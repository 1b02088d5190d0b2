"""Families whose text encoder is a language model, Z-Image and Qwen-Image, against stock diffusers:
prompts, predictions, pictures; what trains and is read back; what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from chat_folders import qwen_image_pipeline, z_image_pipeline
from flow_folders import make_flow_folder
from torch import Tensor

from trainer.backbones.families import family_of
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.data.loader import Batch
from trainer.diffusion.guidance import COND, UNCOND, classifier_free
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import save_adapter
from trainer.training.tasks.denoise import Denoise

Open = Callable[[Path], Any]
PROMPTS = ["a fox on a red background", "an apple"]  # of different lengths
SEEDS = [3, 4]
STEPS = 3
CLOSE = 2 / 255
HEIGHT, WIDTH = 16, 24  # in pixels, of which two are a latent along each edge


@dataclass(frozen=True)
class Case:
    """A family: its stock pipeline, and the options of its call for our guidance."""

    make: Callable[..., Any]
    pipeline: str
    guided: Callable[[float, str], dict[str, Any]]


CASES = {
    "z_image": Case(
        z_image_pipeline,
        "ZImagePipeline",
        lambda scale, text: {"guidance_scale": scale - 1, "negative_prompt": [text] * 2},
    ),
    "qwen_image": Case(
        qwen_image_pipeline,
        "QwenImagePipeline",
        lambda scale, text: {"true_cfg_scale": scale, "negative_prompt": [text] * 2},
    ),
}
FAMILIES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("backbone")
    return {name: make_flow_folder(base / name, case.make) for name, case in CASES.items()}


@pytest.fixture
def copy(name: str, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(folders[name], tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def stock(name: str, folder: Path) -> Any:
    pipe: Any = getattr(diffusers, CASES[name].pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int) -> Tensor:
    return torch.cat(
        [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )


def painted(name: str, pipe: Any, guidance: float = 4.0, negative: str = "") -> Tensor:
    """What a stock pipeline makes from the noise of the seeds."""
    x_t = noise(4, HEIGHT // 2, WIDTH // 2)
    if name == "qwen_image":
        x_t = pipe._pack_latents(x_t, 2, 4, HEIGHT // 2, WIDTH // 2)
    pictures: Tensor = pipe(
        list(PROMPTS), latents=x_t, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
        output_type="pt", **CASES[name].guided(guidance, negative),
    ).images  # fmt: skip
    return pictures


def drawn(model: Any, guidance: float = 4.0, **options: Any) -> Tensor:
    how = Sampling(STEPS, guidance, size=(HEIGHT, WIDTH), **options)
    return sample(model, PROMPTS, SEEDS, settings=how) / 2 + 0.5


def batch_of(step: int = 0) -> Batch:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
    words = ["a <v1> fox", "a cat"]
    return Batch(step, [0, 1], words, words, torch.ones(2), pixels=pixels)


def task_of(model: Any) -> Denoise:
    return Denoise(model, Objective(model.target, model.alphas_cumprod))


def trained(model: Any, tree: dict[str, Any], path: Path, folder: Path) -> Path:
    """The adapter of methods that take two steps on random pictures."""
    plan = apply_methods(model, methods_of(tree))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([named[name] for name in plan.names], lr=3e-2)
    task = task_of(model)
    for step in range(2):
        task.loss(task.encode(batch_of(step))).losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {name: named[name].detach() for name in plan.names}
    save_adapter(
        path, tensors, tree={"backbone": str(folder), "methods": tree}, identity=model.identity()
    )
    return path


@FAMILIES
def test_a_folder_says_its_family(name: str, folders: dict[str, Path], open_folder: Open) -> None:
    model = open_folder(folders[name])
    assert family_of(folders[name]) == model.family == name
    assert (model.target, model.alphas_cumprod) == ("flow", None)
    assert (model.divisor, model.multiple, model.latent_channels) == (2, 4, 4)
    assert model.text_width == 16
    assert model.text_length == {"z_image": 512, "qwen_image": 1024}[name]
    assert len(model.blocks()) == {"z_image": 4, "qwen_image": 2}[name]


@torch.no_grad()
@FAMILIES
def test_prompts_are_those_of_the_stock_pipeline(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    """Of each prompt as many tokens, and no more; the empty one too."""
    model, pipe = open_folder(folders[name]), stock(name, folders[name])
    texts = [*PROMPTS, ""]
    own = model.encode_prompts(texts)
    assert set(own.tensors()) == {"tokens", "mask"}
    if name == "z_image":
        wanted = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[0]
    else:
        tokens, mask = pipe.encode_prompt(texts)
        assert torch.equal(own.mask, mask)
        wanted = [row[kept.bool()] for row, kept in zip(tokens, mask, strict=True)]
    assert [len(row) for row in wanted] == own.mask.sum(1).tolist()
    for row, found in zip(wanted, own.tokens, strict=True):
        torch.testing.assert_close(found[: len(row)], row, rtol=0, atol=1e-5)
        assert not found[len(row) :].any()


@torch.no_grad()
@FAMILIES
def test_a_prediction_is_the_call_of_the_stock_network(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    model = open_folder(folders[name])
    pipe, x_t, t = stock(name, folders[name]), noise(4, 8, 12), torch.tensor([3.0, 700.0])
    if name == "z_image":
        text = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)[0]
        pictures = [picture[:, None] for picture in x_t]
        found = pipe.transformer(pictures, 1 - t / 1000, text).sample
        wanted = -torch.stack(found)[:, :, 0]
    else:
        text, mask = pipe.encode_prompt(PROMPTS)
        found = pipe.transformer(
            pipe._pack_latents(x_t, 2, 4, 8, 12), text, mask, timestep=t / 1000,
            img_shapes=[[(1, 4, 6)]] * 2,
        ).sample  # fmt: skip
        wanted = pipe._unpack_latents(found, 16, 24, 2)[:, :, 0]
    plain = model.predict(x_t, t, model.encode_prompts(PROMPTS))
    torch.testing.assert_close(plain, wanted, rtol=0, atol=1e-5)
    assert float(plain.std()) > 1e-2


@FAMILIES
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (4.0, ""), (3.0, "an owl, left")])
def test_pictures_are_those_of_the_stock_pipeline(
    name: str, guidance: float, negative: str, folders: dict[str, Path], open_folder: Open
) -> None:
    model, pipe = open_folder(folders[name]), stock(name, folders[name])
    wanted = painted(name, pipe, guidance, negative)
    own = drawn(model, guidance, negative=negative)
    assert float((own - wanted).abs().max()) <= CLOSE
    assert float(wanted.std()) > 0.05


@FAMILIES
def test_a_picture_becomes_latents_and_a_picture_again(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    """Latents as the stock pipelines have them: scaled by the VAE's numbers, of each channel where
    these are lists."""
    model = open_folder(folders[name])
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    moments = model.moments(pixels)
    assert moments.shape == (2, 8, 8, 12)
    x0 = model.latents(moments, torch.zeros(2, 4, 8, 12))
    config, mean = model.vae.config, moments[:, :4]
    if name == "z_image":
        wanted = (mean - config.shift_factor) * config.scaling_factor
    else:
        own, std = (
            torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        wanted = (mean - own) / std
        torch.testing.assert_close(
            mean, model.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        )
    torch.testing.assert_close(x0, wanted)


@FAMILIES
def test_the_loss_is_that_of_a_flow(name: str, folders: dict[str, Path], open_folder: Open) -> None:
    """x_t = (1 - t) x0 + t noise, target noise - x0: written out."""
    model = open_folder(folders[name])
    task = task_of(model)
    state = task.encode(batch_of())
    share = (state.t / 1000)[:, None, None, None]
    torch.testing.assert_close(state.x_t, (1 - share) * state.x0 + share * state.noise)
    result = task.loss(state)
    error = (result.output - (state.noise - state.x0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result.losses, error)


def test_guidance_of_qwen_image_keeps_the_length_of_a_token() -> None:
    from trainer.backbones.qwen_image import rescaled

    uncond, cond = torch.randn(2, 2, 4, 4, 6).unbind(0)
    own = classifier_free({UNCOND: uncond, COND: cond}, 3.0, rescaled)
    made = uncond + 3 * (cond - uncond)
    for row in range(2):
        for y in range(0, 4, 2):
            for x in range(0, 6, 2):
                at = (row, slice(None), slice(y, y + 2), slice(x, x + 2))
                wanted = made[at] * cond[at].norm() / made[at].norm()
                torch.testing.assert_close(own[at], wanted)


def test_turbo_samples_and_is_not_trained(tmp_path: Path, open_folder: Open) -> None:
    folder = make_flow_folder(tmp_path / "turbo", z_image_pipeline, shift=3.0)
    words = ["recipe=lora", f"backbone={folder}", "data.prior_weight=0", "run.resolution=16"]
    with pytest.raises(RecipeError, match=r"Turbo was distilled .* train on z_image"):
        load_recipe(words)
    wanted = painted("z_image", stock("z_image", folder), 1.0)
    assert float((drawn(open_folder(folder), 1.0) - wanted).abs().max()) <= CLOSE
