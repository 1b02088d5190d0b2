r"""Trains the tiny CLIP pair (text and image encoder, the judge) on the world and writes it with
its tokenizer.

    python data/tiny/make_clip.py --steps 1500 --out data/tiny
    python data/tiny/make_clip.py --steps 1800 --lr 5e-4 --start-from data/tiny \
        --vae data/tiny/vae --out <folder>

The second goes on with half of the pictures bent, blurred and through the VAE: what it is to judge
is painted, and a judge of clean sprites alone calls a soft crown a cat.

Contrastive on image and caption (CLIP, arXiv 2103.00020), with three aids that known scenes allow:
the image is told its sprites, every patch its sprite (so the judge can also say *where*), and the
caption's last token every word it has read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from trainer.data.world import scenes as world
from trainer.data.world.scenes import SCENE_SIDE, draw_scene
from trainer.data.world.sprites import ALL, CLASS_OF

SEED = 23
LENGTH, PATCH = 32, 8
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
EMPTY = "an empty background"
EXTRA = """a an the on in at of to and with by from for is are photo picture image drawing
illustration painting small big large tiny far away close up zoomed very empty background gradient
object animal food plant vehicle thing face toy person left right top bottom middle corner center
centre above below under over beneath between next beside behind front near moving move moves
rotating spinning growing shrinking passing standing still flying falling rising slowly quickly
camera panning zooming one two three bright dark light good cropped rendering clear my nice lying
day night grass sand snow water sky beach forest city street table room red new old""".split()


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE) in which every word of the world is one token; others fall
    into pieces."""
    captions = [draw_scene(SEED, i, ALL).caption for i in range(3000)]
    words = sorted(
        {word.strip(",") for caption in captions for word in caption.split()}
        | set(ALL)
        | set(EXTRA)
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator([" ".join(words)], trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", show_progress=False,
    ))  # fmt: skip
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [f"{letter}</w>" for letter in letters]
    known = set(pieces)
    pieces += [
        first + second
        for first, second in merges
        if not (first + second in known or known.add(first + second))
    ]
    vocab = {
        piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])
    }
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH, projection_dim=128, pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu", **ends,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        image_size=SCENE_SIDE,
        patch_size=PATCH, projection_dim=128, hidden_act="gelu",
    )  # fmt: skip
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128)
    )


class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Batch `i` of scenes; with a VAE, half of its pictures are worn."""

    def __init__(self, start: int, size: int, count: int, vae: Path | None) -> None:
        self.start, self.size, self.count, self.folder = start, size, count, vae
        self.vae: AutoencoderKL | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        first = self.start + index * self.size
        images, captions, present, labels = batch(first, self.size)
        if self.folder is not None:
            if self.vae is None:  # each worker its own
                torch.set_num_threads(1)
                self.vae = AutoencoderKL.from_pretrained(self.folder, torch_dtype=torch.float32)
            images[::2] = worn(images[::2], self.vae, torch.Generator().manual_seed(first))
        return images, captions, present, labels


@torch.no_grad()
def worn(images: torch.Tensor, vae: AutoencoderKL, random: torch.Generator) -> torch.Tensor:
    """Images (b, 3, H, W) as a painter of latents might leave them: warped by up to 4 pixels,
    decoded from latents that are noisy by up to 0.8 of their spread, finely or in blotches, faded
    and blurred by chance."""
    images = warped(images, 4.0, random)
    latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    count, channels, height, width = latents.shape
    fine = torch.randn(latents.shape, generator=random)
    coarse = torch.randn(count, channels, height // 4, width // 4, generator=random)
    share = torch.rand(count, 1, 1, 1, generator=random)
    noise = (1 - share) * fine + share * F.interpolate(coarse, (height, width), mode="bicubic")
    latents = latents + 0.8 * torch.rand(count, 1, 1, 1, generator=random) * noise
    pictures = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    small = F.interpolate(pictures, scale_factor=0.5, mode="area")
    soft = F.interpolate(small, (images.shape[2], images.shape[3]), mode="bicubic").clamp(-1, 1)
    blur = torch.rand(count, 1, 1, 1, generator=random)
    contrast = 0.7 + 0.5 * torch.rand(count, 1, 1, 1, generator=random)
    bright = 0.3 * (torch.rand(count, 1, 1, 1, generator=random) - 0.5)
    return (torch.lerp(pictures, soft, blur) * contrast + bright).clamp(-1, 1)


def warped(images: torch.Tensor, reach: float, random: torch.Generator) -> torch.Tensor:
    """Images (b, 3, H, W) with their pixels moved smoothly, by about `reach` pixels at the most."""
    count, _, height, width = images.shape
    straight = torch.eye(2, 3).expand(count, 2, 3)
    grid = F.affine_grid(straight, list(images.shape), align_corners=False)
    bent = torch.randn(count, 2, 6, 6, generator=random) / 2
    bent = F.interpolate(bent, (height, width), mode="bicubic").permute(0, 2, 3, 1)
    strength = torch.rand(count, 1, 1, 1, generator=random) * 2 * reach / width
    return F.grid_sample(images, grid + strength * bent, padding_mode="border", align_corners=False)


def batch(start: int, size: int) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
    """Images (b, 3, 64, 64) normalised; captions; present (b, 80) sums to 1; patch labels (b, 64),
    80 empty, -1 unsure."""
    scenes = [draw_scene(SEED, start + i, ALL) for i in range(size)]
    images = (
        torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float()
        / 127.5
        - 1
    )
    present = torch.zeros(size, len(ALL))
    grid = SCENE_SIDE // PATCH
    labels = torch.full((size, grid, grid), -1)
    for row, scene in enumerate(scenes):
        covered = np.zeros((grid, grid))
        for item in scene.objects:
            number = ALL.index(item.word)
            present[row, number] = 1 / len(scene.objects)
            share = item.mask.reshape(grid, PATCH, grid, PATCH).mean((1, 3))
            labels[row][torch.from_numpy(share > 0.4)] = number
            covered += share
        labels[row][torch.from_numpy(covered == 0)] = len(ALL)
    return images, [scene.caption for scene in scenes], present, labels.flatten(1)


def encode(model: CLIPModel, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit embeddings of the image (b, d) and of its patches (b, n, d)."""
    hidden = model.vision_model(pixel_values=images).last_hidden_state
    embeds = F.normalize(
        model.visual_projection(model.vision_model.post_layernorm(hidden)).float(), dim=-1
    )
    return embeds[:, 0], embeds[:, 1:]


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )


def text_embeds(
    model: CLIPModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    pooled = model.text_model(input_ids=inputs["input_ids"]).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1), pooled


@torch.no_grad()
def accuracy(model: CLIPModel, tokenizer: CLIPTokenizer, count: int) -> float:
    """Share of unseen one-sprite scenes whose sprite is named right among all 80."""
    model.eval()
    names, _ = text_embeds(model, tokens(tokenizer, [world.article(word) for word in ALL]))
    right = 0
    for start in range(0, count, 200):
        scenes = [draw_scene(SEED + 1, 50_000_000 + start + i, ALL, count=1) for i in range(200)]
        images = (
            torch.from_numpy(np.stack([s.image for s in scenes])).permute(0, 3, 1, 2).float()
            / 127.5
            - 1
        )
        named = (encode(model, images)[0] @ names.T).argmax(1)
        right += sum(
            ALL[number] == scene.objects[0].word
            for number, scene in zip(named.tolist(), scenes, strict=True)
        )
    model.train()
    return right / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument(
        "--start-from", type=Path, help="a folder written by an earlier, shorter training"
    )
    parser.add_argument("--vae", type=Path, help="a VAE to wear half of the pictures with")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    torch.manual_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if options.start_from:  # with its tokenizer: pieces of equal rank come out in another order
        tokenizer = CLIPTokenizer.from_pretrained(options.start_from / "clip")
        model = CLIPModel.from_pretrained(options.start_from / "clip", dtype=torch.float32)
    model.train()
    reader = torch.nn.Linear(128, len(tokenizer))
    prompts = tokens(tokenizer, [*(world.article(word) for word in ALL), EMPTY])
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": [*rest, *reader.parameters()],
        "weight_decay": 0.0}],
        lr=options.lr, betas=(0.9, 0.98),
    )  # fmt: skip
    begin = time.time()
    offset = int(1e8) if options.start_from else 0
    batches = Batches(offset, options.batch, options.steps, options.vae)
    workers = 1 if options.vae else 0
    for step, (images, captions, present, labels) in enumerate(
        torch.utils.data.DataLoader(batches, batch_size=None, num_workers=workers)
    ):
        spent = step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = (
                options.lr
                * min(1, (step + 1) / 200)
                * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * spent)))
            )
        inputs = tokens(tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16):
            whole, patches = encode(model, images)
            described, pooled = text_embeds(model, inputs)
            names, _ = text_embeds(model, prompts)
            read = reader(pooled).float()
        scale = model.logit_scale.exp().clamp(max=100)
        logits = scale * whole @ described.T
        target = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        naming = F.cross_entropy(scale * whole @ names[:-1].T, present)
        patching = F.cross_entropy(
            (scale * patches @ names.T).flatten(0, 1), labels.flatten(), ignore_index=-1
        )
        words = torch.zeros_like(read).scatter_(1, inputs["input_ids"], 1.0)
        reading = F.binary_cross_entropy_with_logits(read, words) * 20
        loss = contrast + naming + patching + 0.2 * reading
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            parts = " ".join(f"{x.item():.3f}" for x in (contrast, naming, patching, reading))
            print(f"step {step} {time.time() - begin:.0f}s {parts}", flush=True)
        if step % 500 == 0:
            print(f"  accuracy {accuracy(model, tokenizer, 400):.3f}", flush=True)
    print(
        f"{options.steps} steps of {options.batch}; accuracy on 2000 unseen scenes "
        f"{accuracy(model, tokenizer, 2000):.4f}"
    )
    save(model.eval(), tokenizer, options.out)


def save(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """`clip/` is the judge, whole; `text_encoder/` and `tokenizer/` are what the U-Net starts from
    and trains along."""
    size = {"height": SCENE_SIDE, "width": SCENE_SIDE}
    processor = CLIPImageProcessorPil(
        size=size,
        do_center_crop=False,
        image_mean=MEAN,
        image_std=STD,
        do_resize=True,
        crop_size=size,
    )
    (out / "clip").mkdir(parents=True, exist_ok=True)
    (out / "clip" / "patches.json").write_text(
        json.dumps({"empty": EMPTY})
    )  # its patches can be named, too
    model.half().save_pretrained(out / "clip", safe_serialization=True)
    tokenizer.save_pretrained(out / "clip")
    processor.save_pretrained(out / "clip")
    CLIPTextModel.from_pretrained(out / "clip", dtype=torch.float16).save_pretrained(
        out / "text_encoder"
    )
    tokenizer.save_pretrained(out / "tokenizer")


if __name__ == "__main__":
    assert len(ALL) == 80 and set(CLASS_OF) == set(ALL)
    main()
