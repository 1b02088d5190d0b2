"""A run through `fit` ends with the weights of a training loop that is written out here.

The loop takes the recipe's samples and its edited model, and nothing else of ours: noise, targets,
timesteps, loss weights, dropped captions, learning rates, clipping, accumulation and the average
are computed by formulas, by diffusers and by torch. A term that `fit` drops, exchanges or scales
otherwise shows as another adapter.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor

from trainer.common.seeds import seed_of
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.data.loader import Planned
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_base
from trainer.training import build
from trainer.training.fit import fit

SHARED = [
    "recipe=lora", "tracker=none", "preview.every=0", "data.prior_steps=2", "run.validate_every=0",
    "run.checkpoint_every=0", "run.resolution=32", "run.seed=7", "data.class_word=null",
    "data.prior_images=3", "data.prior_prompts=[a fox, a cat]", "methods.new_token.init=fox",
]  # fmt: skip
VP = [
    "run.steps=3", "run.batch_size=4", "run.accumulate=2", "data.prior_weight=0.3",
    "data.augment=true", "methods.lora={rank: 4, dropout: 0.3, sites: all}",
    "objective.weighting=min_snr", "objective.min_snr_gamma=1.5", "objective.offset_noise=0.4",
    "objective.caption_dropout=0.5", "objective.timesteps=logit_normal",
    "objective.logit_mean=-0.4", "objective.logit_std=0.7",
    "optim.lr=1e-4", "optim.scale_lr=true", "optim.lrs.new_token=3e-3", "optim.betas=[0.8, 0.95]",
    "optim.eps=1e-6", "optim.weight_decay=0.2", "optim.warmup=1", "optim.schedule=cosine",
    "optim.final_lr=0.3", "optim.clip=0.01", "optim.ema=0.15",
]  # fmt: skip
FLOW = [
    "run.steps=2", "run.batch_size=2", "data.prior_weight=2", "data.augment=false",
    "methods.lora={rank: 2, sites: cross}", "objective.weighting=sigma_sqrt",
    "objective.timesteps=uniform", "objective.caption_dropout=0", "optim.lr=1e-3",
    "optim.scale_lr=false", "optim.lrs.new_token=1e-2", "optim.warmup=0", "optim.clip=null",
    "optim.schedule=constant", "optim.ema=null",
]  # fmt: skip


def test_a_variance_preserving_run(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe([*SHARED, *VP, f"backbone={tiny_folder}", f"run.out={tmp_path}"])
    model, batches, trained = prepared(recipe)
    scheduler = DDPMScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    groups = [
        {"params": [value for name, value in trained.items() if "lora" in name], "lr": 8 * 1e-4},
        {
            "params": [value for name, value in trained.items() if "lora" not in name],
            "lr": 8 * 3e-3,
        },
    ]  # scaled by the images of a step: batches of 4, twice accumulated
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.2)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    shares = [1 / 2, 1.0, 0.3 + 0.7 * (1 + math.cos(math.pi * 1 / 2)) / 2]
    average = {name: value.detach().clone() for name, value in trained.items()}
    masks = torch.cat([batches[number].masks for number in range(6)])
    assert 0 < masks.mean() < 1  # a photo that was zoomed out covers a part of its picture
    norms = []
    for step, share in enumerate(shares):
        optimizer.zero_grad()
        for batch in (batches[2 * step], batches[2 * step + 1]):
            assert len(set(batch.weights.tolist())) == 2  # photos and class images
            (vp_loss(model, batch, scheduler) / 2).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(trained.values()), 0.01)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * share
        optimizer.step()
        decay = min(0.15, (2 + step) / (11 + step))
        for name, value in trained.items():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
    assert min(norms) > 0.01  # what is clipped
    same_adapter(fit(recipe) / "adapter.safetensors", average)


def vp_loss(model: Any, batch: Any, scheduler: DDPMScheduler) -> Tensor:
    """Mean over samples of weight * min(snr, gamma) / (snr + 1) * |v_theta - v|^2, min-SNR for v as
    in arXiv 2303.09556."""
    torch.manual_seed(seed_of(7, "dropout", batch.step, 0))
    x0, noise, offset = latents(model, batch)
    noise = noise + 0.4 * offset[:, :, :1, :1]
    u = torch.tensor([uniform(batch, i, "u") for i in range(len(x0))], dtype=torch.float64)
    share = torch.sigmoid(-0.4 + 0.7 * torch.special.ndtri(u))
    t = (share * 1000).long()
    captions = [
        "" if uniform(batch, i, "caption") < 0.5 else caption
        for i, caption in enumerate(batch.captions)
    ]
    x_t = scheduler.add_noise(x0, noise, t)
    v = scheduler.get_velocity(x0, noise, t)
    output = model.unet(x_t, t, encoder_hidden_states=encoded(model, captions)).sample
    signal = scheduler.alphas_cumprod[t]
    snr = signal / (1 - signal)
    weight = snr.clamp(max=1.5) / (snr + 1)
    error = (output - v) ** 2
    mask = batch.masks.expand_as(error)
    means = [(error[i] * mask[i]).sum() / mask[i].sum() for i in range(len(x0))]
    return (batch.weights * weight * torch.stack(means)).mean()


def test_a_flow_run(dit_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe([*SHARED, *FLOW, f"backbone={dit_folder}", f"run.out={tmp_path}"])
    model, batches, trained = prepared(recipe)
    groups = [
        {"params": [value for name, value in trained.items() if "lora" in name], "lr": 1e-3},
        {"params": [value for name, value in trained.items() if "lora" not in name], "lr": 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for step in range(2):
        optimizer.zero_grad()
        flow_loss(model, batches[step]).backward()
        optimizer.step()
    same_adapter(fit(recipe) / "adapter.safetensors", trained, 2e-5)


def flow_loss(model: Any, batch: Any) -> Tensor:
    """Mean over samples of weight * sigma^-2 * |u_theta - (noise - x0)|^2, arXiv 2403.03206."""
    x0, noise, _ = latents(model, batch)
    u = torch.tensor([uniform(batch, i, "u") for i in range(len(x0))])
    sigma = u[:, None, None, None]
    x_t = (1 - sigma) * x0 + sigma * noise
    tokens = model.tokens(batch.captions)
    text = model.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    output = model.transformer(
        x_t,
        timestep=1000 * u,
        encoder_hidden_states=text.last_hidden_state,
        encoder_attention_mask=tokens.attention_mask,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    means = ((output - (noise - x0)) ** 2).mean(dim=(1, 2, 3))
    return (batch.weights * u.clamp(min=1e-3) ** -2 * means).mean()


def prepared(recipe: Recipe) -> tuple[Any, Planned, dict[str, Tensor]]:
    """The model as the recipe's methods leave it, its batches, and what trains by name."""
    model: Any = load_base(recipe.backbone, recipe.backbone_name)
    data, _ = recipe.data.open(build.needs(recipe, model))
    plan = apply_methods(model, recipe.methods, recipe.run.seed)
    batches = Planned(data, build.step_plan(recipe, data), None, 0, 1)
    return model, batches, {name: model.get_parameter(name) for name in plan.names}


def latents(model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise and the offset's noise; each sample draws three tensors from a seed of its own. The
    posterior has the precision in which it would be cached."""
    drawn = []
    for place in batch.positions:
        rng = torch.Generator().manual_seed(seed_of(7, "train", batch.step, place))
        drawn.append(torch.randn(3, 1, model.latent_channels, 8, 8, generator=rng)[:, 0])
    posterior, noise, offset = torch.stack(drawn, 1)
    with torch.no_grad():
        found = model.vae.encode(batch.pixels).latent_dist.parameters.half().float()
    mean, log_variance = found.chunk(2, dim=1)
    x0 = mean + (log_variance / 2).exp() * posterior
    return x0 * model.vae.config.scaling_factor, noise, offset


def uniform(batch: Any, index: int, *purpose: str) -> float:
    return seed_of(7, "train", batch.step, batch.positions[index], *purpose) / 2**63


def encoded(model: Any, captions: list[str]) -> Tensor:
    ids = model.tokenizer(
        captions, padding="max_length", truncation=True, return_tensors="pt",
        max_length=model.text_length,
    ).input_ids  # fmt: skip
    found: Tensor = model.text_encoder(ids).last_hidden_state
    return found


def same_adapter(path: Path, wanted: dict[str, Tensor], within: float = 1e-6) -> None:
    """within: AdamW divides small gradients by small roots, where rounding shows."""
    found = load_file(path)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=within)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_CACHE", str(tmp_path / "cache"))
