"""Trains the tiny VAE on scenes of the known sprites and writes it in diffusers layout.

    python data/tiny/make_vae.py --steps 2400 --out data/tiny/vae
    python data/tiny/make_vae.py --decoder data/tiny/vae --steps 1200 --lr 1e-3 --out decoded

The second trains the decoder alone, on the 384 sprites of the wider world, so the latents and all
that learned from them stay as they are. A small network that tells real patches from decoded ones
is trained against it (patch GAN, arXiv 1611.07004, with the hinge loss) and keeps its edges sharp.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from trainer.data.world.scenes import draw_scene
from trainer.data.world.sprites import KNOWN, WIDE_KNOWN

SEED = 11
Names = tuple[str, ...]  # the sprites that scenes show


def batch(start: int, size: int, names: Names = KNOWN) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (size, 3, 64, 64) in [-1, 1] and pixel weights (size, 1, 64, 64), 3 on sprites."""
    scenes = [draw_scene(SEED, start + i, names) for i in range(size)]
    images = (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )
    masks = np.stack([np.any([item.mask for item in scene.objects], axis=0) for scene in scenes])
    return images, 1 + 2 * torch.from_numpy(masks)[:, None].float()


def crops(
    start: int, size: int, names: Names = KNOWN, *, side: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, cut to (side, side) around one sprite: the network has no attention, and flat
    ground teaches little."""
    rng = np.random.default_rng((SEED, start))
    images, weights = batch(start, size, names)
    cut = []
    for row in range(size):
        ys, xs = np.nonzero(weights[row, 0].numpy() > 1)
        pick = rng.integers(len(ys))
        y, x = (
            int(np.clip(v[pick] - side // 2 + rng.integers(-6, 7), 0, 64 - side)) for v in (ys, xs)
        )
        cut.append(
            (
                images[row, :, y : y + side, x : x + side],
                weights[row, :, y : y + side, x : x + side],
            )
        )
    return torch.stack([image for image, _ in cut]), torch.stack([weight for _, weight in cut])


def rate(step: int, steps: int) -> float:
    """The factor on the learning rate: a warm-up of 50 steps, then a cosine."""
    return min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def distance(rebuilt: torch.Tensor, images: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted error of the pixels, and that of the differences between neighbours."""
    pairs = zip(edges(rebuilt), edges(images), strict=True)
    return (weights * (rebuilt - images).abs()).mean() + sum(
        0.5 * (one - other).abs().mean() for one, other in pairs
    )


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def patch_critic() -> nn.Module:
    """Pictures (n, 3, h, w) to a number for each patch of 18 pixels: high where it looks real."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, stride=2, padding=1), nn.LeakyReLU(0.2),
        nn.Conv2d(24, 48, 4, stride=2, padding=1), nn.GroupNorm(8, 48), nn.LeakyReLU(0.2),
        nn.Conv2d(48, 1, 3, padding=1),
    )  # fmt: skip


def train_decoder(vae: AutoencoderKL, steps: int, size: int, lr: float) -> None:
    """Trains the decoder on crops, for the first third without the critic."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    weights_of = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights_of, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    critic = patch_critic()
    against = torch.optim.AdamW(critic.parameters(), lr=lr / 2, betas=(0.5, 0.9))
    begin = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        images, weights = crops(step * size * 4, size, WIDE_KNOWN)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        rebuilt = vae.decode(latents + 0.03 * torch.randn_like(latents)).sample
        loss = distance(rebuilt, images, weights)
        fooled = torch.zeros(())
        if step > steps / 3:
            fooled = -critic(rebuilt).mean()
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.01 * fooled).backward()
        torch.nn.utils.clip_grad_norm_(weights_of, 1.0)
        optimizer.step()
        real, made = critic(images), critic(rebuilt.detach())
        told = F.relu(1 - real).mean() + F.relu(1 + made).mean()
        against.zero_grad(set_to_none=True)
        told.backward()
        against.step()
        if step % 50 == 0:
            print(f"step {step} {time.time() - begin:.0f}s loss {loss.item():.4f} critic "
                  f"{told.item():.3f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decoder", type=Path, help="a VAE of which the decoder alone is trained")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "vae")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    if options.decoder:
        vae = AutoencoderKL.from_pretrained(options.decoder, torch_dtype=torch.float32)
        train_decoder(vae, options.steps, 2 * options.batch, options.lr)
        finish(vae.eval(), options.out, WIDE_KNOWN, scale=vae.config.scaling_factor)
        return
    vae = AutoencoderKL(
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    begin = time.time()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate(step, options.steps)
        if step < 0.75 * options.steps:
            images, weights = crops(step * options.batch * 4, options.batch * 3)
        else:
            images, weights = batch(step * options.batch * 4, options.batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            rebuilt = vae.decode(posterior.sample()).sample.float()
        loss = distance(rebuilt, images, weights)
        loss = loss + 1e-5 * posterior.kl().float().mean() / 10
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step} {time.time() - begin:.0f}s loss {loss.item():.4f}", flush=True)
    finish(vae.eval(), options.out)


@torch.no_grad()
def finish(
    vae: AutoencoderKL, out: Path, names: Names = KNOWN, *, scale: float | None = None
) -> None:
    """Sets the latent scale, to unit variance if none is given, measures on unseen scenes, and
    saves fp16 safetensors."""
    images, _ = batch(10_000_000, 256, names)
    latents = vae.encode(images).latent_dist.sample()
    vae.register_to_config(scaling_factor=scale or round(1 / latents.std().item(), 5))
    rebuilt = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * torch.log10(((rebuilt - images) / 2).square().mean())
    print(f"scaling_factor {vae.config.scaling_factor} psnr {psnr:.2f} dB on 256 unseen scenes")
    print("channel mean", (latents.mean((0, 2, 3)) * vae.config.scaling_factor).tolist())
    print("channel std", (latents.std((0, 2, 3)) * vae.config.scaling_factor).tolist())
    vae.half().save_pretrained(out, safe_serialization=True)


if __name__ == "__main__":
    main()
