"""The parts of `editing.py` that measure inversion, masks of maps, large pictures, pictures between
two, a segmenter of made masks, and what an edit costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean, median

import numpy as np
import torch
import torch.nn.functional as F
from _common import Bars
from _edit_scenes import Studio, iou, one_sprite, two_sprites
from PIL import Image
from torch import Tensor, nn

from trainer.data.world.scenes import article, draw_scene
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.shares import share
from trainer.media.images import to_tensor

WORDS = ("fox", "cat", "dog", "cow", "apple", "tree")  # classes of the segmenter
SEGMENTER_SEED, EPOCHS, TESTED = 5, 30, 120


def inversion(bars: Bars, studio: Studio) -> None:
    """Real scenes as noise and back, on a U-Net and on a transformer."""
    for name in ("tiny", "tiny_dit"):
        own = Studio(studio.count, studio.steps, name=name)
        losses, drift = [], []
        for number in range(studio.count):
            scene = draw_scene(77, number)
            pixels = to_tensor(Image.fromarray(scene.image))
            found = own.inverted(pixels, scene.caption)
            seen: list[Tensor] = []
            again = sample(
                own.backbone,
                [scene.caption],
                [0],
                settings=own.settings(1.0),
                start=found.start,
                on_step=lambda _, x, kept=seen: kept.append(x),
            )[0]
            losses.append(_psnr(again, own.vae(pixels)))
            drift.append(max(
                float((x - found.trajectory[n + 1]).norm() / found.trajectory[n + 1].norm())
                for n, x in enumerate(seen)
            ))  # fmt: skip
        bars.at_least(f"{name} inversion and back, dB to the VAE's own", median(losses), 26)
        bars.note(f"{name} farthest from the trajectory, relative", median(drift))


def _psnr(one: Tensor, other: Tensor) -> float:
    return float(10 * torch.log10(4 / (one - other).square().mean().clamp_min(1e-9)))


def masks(bars: Bars, studio: Studio) -> None:
    """Masks of words against those that are known, while real scenes are generated again."""
    for count, bar in ((1, 0.55), (2, 0.45)):
        found = []
        for number in range(studio.count):
            if count == 1:
                scene = one_sprite(number)
                pixels, prompt, known = scene.pixels, scene.prompt, dict(scene.masks)
            else:
                drawn = two_sprites(number)
                pixels, prompt = to_tensor(Image.fromarray(drawn.image)), drawn.caption
                known = {one.word: torch.from_numpy(one.mask) for one in drawn.objects}
            made = _shown_again(studio, pixels, prompt, list(known))
            found += [iou(made[word], mask) for word, mask in known.items()]
        bars.at_least(f"masks of words, {count} sprite{'s' * (count > 1)}, IoU", mean(found), bar)


def _shown_again(
    studio: Studio, pixels: Tensor, prompt: str, words: Sequence[str]
) -> dict[str, Tensor]:
    """Masks (H, W) of words of a real scene."""
    from trainer.config.load import methods_of
    from trainer.diffusion.image_edit import used_maps
    from trainer.methods.apply import apply_methods

    own = studio.inverted(pixels, prompt)
    methods = methods_of({"diffumask": {"mask_words": list(words)}})
    apply_methods(studio.backbone, methods, trains=False)
    how = studio.settings(1.0)
    sample(studio.backbone, [prompt], [0], settings=how, start=own.start)
    shown = used_maps(studio.backbone.hooks)
    studio.backbone.sampling_hooks.clear()
    size = (pixels.shape[-2], pixels.shape[-1])
    return {
        word: F.interpolate(shown[f"map of {word}"][:, None], size=size, mode="bilinear")[0, 0]
        > 0.5
        for word in words
    }


def fam(bars: Bars, studio: Studio) -> None:
    """Twice the size that the model was trained at."""
    side = 2 * studio.backbone.resolution
    how = Sampling(min(25, studio.steps), studio.guidance, size=(side, side))
    right: dict[str, list[bool]] = {"fam": [], "direct": []}
    for number in range(studio.count):
        scene = one_sprite(number)
        (word,) = scene.masks
        methods = {"fam_diffusion": {"sites": "self & up & /2"}}
        made = studio.edited(methods, [scene.prompt], None, settings=how, seed=number).pictures[0]
        alone = studio.plain(scene.prompt, seed=number, settings=how)
        for name, picture in (("fam", made), ("direct", alone)):
            small = F.interpolate(picture[None], scale_factor=0.5, mode="area")[0]
            right[name].append(studio.named([small])[0] == word)
    bars.note("direct, judged right", share(right["direct"]))
    bars.note("fam_diffusion, judged right", share(right["fam"]))
    ratio = mean(right["fam"]) / max(mean(right["direct"]), 1 / studio.count)
    bars.at_least("fam_diffusion, right against direct", ratio, 1.2)


def aid(bars: Bars, studio: Studio) -> None:
    """How evenly 7 pictures go from one to another: the largest distance of neighbours, of the
    judge's embeddings."""
    jumps: dict[str, list[float]] = {"aid": [], "lerp of text and noise": [], "lerp of noise": []}
    how = Sampling(min(25, studio.steps), studio.guidance)
    for number in range(min(studio.count, 32)):
        one, other = one_sprite(number), one_sprite(number + 1000)
        told = {"settings": how, "seed": number, "between": 5}
        prompts = [one.prompt, other.prompt]
        made = studio.edited({"aid": {}}, prompts, None, **told).pictures
        bare = {"aid": {"steps": None}}  # text and noise alone
        text = studio.edited(bare, prompts, None, **told).pictures
        same = studio.edited(bare, [one.prompt, one.prompt], None, **told).pictures
        for name, pictures in zip(jumps, (made, text, same), strict=True):
            embedded = studio.judge.images(pictures)
            jumps[name].append(float((1 - (embedded[1:] * embedded[:-1]).sum(1)).max()))
    for name, values in jumps.items():
        bars.note(f"largest step between neighbours, {name}", mean(values))
    lerp = max(mean(jumps["lerp of text and noise"]), 1e-9)
    bars.at_most("aid against lerp of text and noise", mean(jumps["aid"]) / lerp, 1.0)


class Segmenter(nn.Sequential):
    """Classes of each pixel (b, 1 + words, h, w) of pictures (b, 3, h, w)."""

    def __init__(self, classes: int, width: int = 32) -> None:
        layers: list[nn.Module] = []
        for number, reach in enumerate((1, 2, 4, 8, 4, 1)):
            inputs = width if number else 3
            layers.append(nn.Conv2d(inputs, width, 3, padding=reach, dilation=reach))
            layers += [nn.GroupNorm(4, width), nn.SiLU()]
        super().__init__(*layers, nn.Conv2d(width, classes, 1))


def diffumask(bars: Bars, studio: Studio) -> None:
    """A segmenter trained on made pictures and masks, and one trained on real ones."""
    count = studio.count * len(WORDS) // 2
    real = _real(count, start=0)
    tested = _real(min(TESTED, count), start=100_000)
    scores = {
        name: _mean_iou(_trained(pictures, labels), *tested)
        for name, (pictures, labels) in {"real": real, "made": _made(studio, count)}.items()
    }
    bars.note("segmenter's mIoU on real scenes", scores)
    bars.at_least("diffumask, of the real one's mIoU", scores["made"] / scores["real"], 0.8)


def _real(count: int, start: int) -> tuple[Tensor, Tensor]:
    pictures, labels = [], []
    for number in range(count):
        scene = draw_scene(SEGMENTER_SEED, start + number, WORDS, count=1)
        placed = scene.objects[0]
        pictures.append(to_tensor(Image.fromarray(scene.image)))
        mask = torch.from_numpy(np.ascontiguousarray(placed.mask))
        labels.append(mask.long() * (1 + WORDS.index(placed.word)))
    return torch.stack(pictures), torch.stack(labels)


def _made(studio: Studio, count: int) -> tuple[Tensor, Tensor]:
    pictures, labels = [], []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        colour = draw_scene(SEGMENTER_SEED, number, WORDS, count=1).background
        prompt = f"{article(word)} on {article(colour)} background"
        methods = {"diffumask": {"mask_words": [word]}}
        how = Sampling(min(25, studio.steps), studio.guidance)
        made = studio.edited(methods, [prompt], None, settings=how, seed=number)
        size = (made.pictures.shape[-2], made.pictures.shape[-1])
        maps = F.interpolate(made.shown[f"map of {word}"][:, None], size=size, mode="bilinear")
        pictures.append(made.pictures[0])
        labels.append((maps[0, 0] > 0.5).long() * (1 + WORDS.index(word)))
    return torch.stack(pictures), torch.stack(labels)


def _trained(pictures: Tensor, labels: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = Segmenter(1 + len(WORDS))
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(pictures)).split(16):
            loss = F.cross_entropy(model(pictures[rows]), labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    return model.eval()


@torch.no_grad()
def _mean_iou(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Over the classes that there are."""
    found = torch.cat([model(part).argmax(1) for part in pictures.split(32)])
    classes = [own for own in range(1 + len(WORDS)) if bool((labels == own).any())]
    return mean(iou(found == own, labels == own) for own in classes)


def cost(bars: Bars, studio: Studio) -> None:
    """The time of an edit by stored maps, against plain sampling of as many rows."""
    how = Sampling(studio.steps, studio.guidance)
    source, prompt = "a fox on a red background", "a cat on a red background"
    edit, plain = [], []
    for _ in range(2 if bars.quick else 7):  # in turns, since other work slows both
        begun = time.perf_counter()
        studio.edited({"p2p": {"blend": True}}, [prompt], source, settings=how)
        edit.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        sample(studio.backbone, [source, prompt], [0, 0], settings=how)
        plain.append(time.perf_counter() - begun)
    bars.note("an edit, s", median(edit))
    bars.note("plain sampling of as many rows, s", median(plain))
    bars.at_most("p2p, time against plain sampling", median(edit) / median(plain), 1.35)
