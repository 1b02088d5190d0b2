"""The parts of `editing.py` that edit a picture and ask what has changed."""

from __future__ import annotations

import re
from statistics import mean, median
from typing import Any

import torch
from _common import Bars
from _edit_scenes import (
    Studio,
    box,
    foreground,
    iou,
    nearest_of,
    one_sprite,
    other_word,
    psnr_where,
    staged,
    two_sprites,
)
from PIL import Image

from trainer.data.world.scenes import Spot, article
from trainer.evaluation.shares import share
from trainer.media.images import to_tensor

CORNERS = ("in the top left corner", "in the top right corner", "in the bottom left corner",
           "in the bottom right corner")  # fmt: skip


def swapped_text(prompt: str, old: str, new: str) -> str:
    """A prompt with another sprite, which has as many words as the one before."""
    changed = re.sub(rf"\ban? {old}\b", article(new), prompt)
    return re.sub(rf"\b{old}\b", new, changed)


def p2p(bars: Bars, studio: Studio) -> None:
    """Swaps of one sprite of two in real scenes."""
    new, other, plain, outside = [], [], [], []
    for number in range(studio.count):
        scene = two_sprites(number)
        old, kept = (each.word for each in scene.objects)
        word = other_word(number, old, kept)
        prompt = swapped_text(scene.caption, old, word)
        pixels = to_tensor(Image.fromarray(scene.image))
        own = studio.inverted(pixels, scene.caption)
        methods = {"p2p": {"blend": [old, word], "null_text": 0}}
        made = studio.edited(methods, [prompt], scene.caption, inverted=own).pictures[0]
        alone = studio.plain(prompt, own.start)
        named, found = studio.pairs([made])[0], studio.pairs([alone])[0]
        new.append(word in named)
        other.append(kept in named)
        plain.append((word in found, kept in found))
        mask = torch.from_numpy(scene.objects[0].mask)
        outside.append(psnr_where(made, studio.vae(pixels), ~box(mask)))
        plain[-1] += (psnr_where(alone, studio.vae(pixels), ~box(mask)),)
    bars.at_least("p2p new sprite right", share(new), 0.70)
    bars.at_least("p2p other sprite kept", share(other), 0.80)
    bars.at_least("p2p outside the mask, dB", median(outside), 24)
    for at, what in enumerate(("new sprite right", "other sprite kept")):
        bars.note(f"plain {what}", share(row[at] for row in plain))
    bars.note("plain outside the mask, dB", median(row[2] for row in plain))


def masactrl(bars: Bars, studio: Studio) -> None:
    """Moves from one corner to another."""
    found: dict[str, list[Any]] = {"sprite": [], "place": [], "plain sprite": [], "plain": []}
    for number in range(studio.count):
        start, end = CORNERS[number % 4], CORNERS[(number + 1 + number // 4 % 3) % 4]
        scene = one_sprite(number, start)
        (word,) = scene.masks
        prompt = scene.prompt.replace(start, end)
        own = studio.inverted(scene.pixels, "")  # as the method's authors invert
        made = studio.edited({"masactrl": {}}, [prompt], "", inverted=own).pictures[0]
        alone = studio.plain(prompt, own.start)
        names = studio.named([made, alone])
        found["sprite"].append(names[0] == word)
        found["plain sprite"].append(names[1] == word)
        found["place"].append(nearest_of(CORNERS, *studio.centre(made, word)) == end)
        found["plain"].append(nearest_of(CORNERS, *studio.centre(alone, word)) == end)
    bars.at_least("masactrl same sprite", share(found["sprite"]), 0.80)
    bars.note("masactrl place right", share(found["place"]))
    bars.note("plain sprite right", share(found["plain sprite"]))
    bars.note("plain place right", share(found["plain"]))
    better = mean(found["place"]) - mean(found["plain"])
    bars.at_least("masactrl place better than plain", better, 0.15)


def pnp(bars: Bars, studio: Studio) -> None:
    """Another sprite, or another background, in the same layout."""
    ious, right, plain = [], [], []
    for number in range(studio.count):
        scene = one_sprite(number)
        (word,) = scene.masks
        new, prompt = word, scene.prompt
        if number % 2:
            new = other_word(number, word)
            prompt = prompt.replace(article(word), article(new))
        else:
            prompt = prompt.replace(scene.colour, "purple")
        own = studio.inverted(scene.pixels, "")
        made = studio.edited({"pnp": {}}, [prompt], "", inverted=own).pictures[0]
        alone = studio.plain(prompt, own.start)
        source = box(scene.masks[word])
        ious.append(iou(box(foreground(made)), source))
        plain.append(iou(box(foreground(alone)), source))
        right.append(studio.named([made])[0] == new)
    bars.at_least("pnp box IoU with the source", mean(ious), 0.7)
    bars.at_least("pnp target right", share(right), 0.65)
    bars.note("plain box IoU with the source", mean(plain))


def shape_guided(bars: Bars, studio: Studio) -> None:
    """Another sprite inside a given mask."""
    ious, plain, right = [], [], []
    for number in range(studio.count):
        scene = one_sprite(number)
        (word,) = scene.masks
        new = other_word(number, word)
        prompt = scene.prompt.replace(article(word), article(new))
        mask = scene.masks[word]
        own = studio.inverted(scene.pixels, scene.prompt)
        made = studio.edited(
            {"shape_guided": {"inside": [new]}},
            [prompt],
            scene.prompt,
            inverted=own,
            masks={"source": mask[None, None].float()},
        ).pictures[0]
        alone = studio.plain(prompt, own.start)
        ious.append(iou(foreground(made), mask))
        plain.append(iou(foreground(alone), mask))
        right.append(studio.named([made])[0] == new)
    bars.at_least("shape_guided mask IoU", mean(ious), 0.6)
    bars.note("plain mask IoU", mean(plain))
    bars.note("shape_guided target right", share(right))


def tf_icon(bars: Bars, studio: Studio) -> None:
    """A sprite of one picture put into another, which has an object of its own."""
    right, outside = [], []
    for number in range(min(studio.count, 32)):
        scene = one_sprite(number, "in the top left corner")
        (there,) = scene.masks
        word = other_word(number, there)
        spot = Spot(word, x=44, y=44, size=28)
        reference = staged([spot], "", "white")
        mask = reference.masks[word]
        prompt = f"{article(word)} and {article(there)} on a {scene.colour} background"
        given = {
            "inverted": studio.inverted(scene.pixels, ""),
            "reference": studio.inverted(reference.pixels, ""),
            "masks": {"source": mask[None, None].float()},
            "settings": studio.settings(2.5),
        }
        made = studio.edited({"tf_icon": {}}, [prompt], "", **given).pictures[0]
        right.append(word in studio.pairs([made])[0])
        outside.append(psnr_where(made, studio.vae(scene.pixels), ~box(mask)))
    bars.at_least("tf_icon composed sprite right", share(right), 0.65)
    bars.at_least("tf_icon background outside, dB", median(outside), 24)
