"""Trained branches of attention, and painted words: what each shows of what it is told.

    python bench/branches.py --keep ./kept
    python bench/branches.py --only ip_adapter,ip_adapter_export
    python bench/branches.py --quick

References are sprites that no denoiser was trained on. The encoder that ships is the judge's, and
has seen them, so these figures say how well a branch carries what its encoder knows.

The parts are `PARTS`. With --only the other figures stay as they are in the result file. Quick: few
steps, which learn nothing, in a few minutes. Further words go to every `fit`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from _common import Bars, chosen_of, parser_of
from _runs import Run, Runs
from _steps import Step, facts, interleaved
from PIL import Image
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.common.paths import DATA
from trainer.config.lineage import backbone_spec
from trainer.config.load import methods_of
from trainer.data.world.object_pictures import alone
from trainer.data.world.scenes import COLOURS, article, background
from trainer.data.world.sprites import ALL, HELD_OUT, KNOWN
from trainer.diffusion.sampler import sample_many
from trainer.diffusion.sampling_settings import Sampling
from trainer.evaluation.judge import Judge
from trainer.evaluation.shares import Share, share
from trainer.media.images import to_pil, to_tensor
from trainer.methods.apply import apply_methods
from trainer.ops.ediff_i import box_region
from trainer.runs.adapter import load_adapted

QUICK = ("run.steps=2", "data.count=64", "data.validation=0")
TINY = "tiny"
SHOWN = Sampling(steps=25, guidance=4.0)
EACH = 4  # pictures of every reference
UNET = Run("ip_adapter", ("recipe=ip_adapter",), judged=False)
DIT = Run("ip_adapter_dit", ("recipe=ip_adapter", "backbone=tiny_dit"), judged=False)
PVA = Run("pva", ("recipe=pva",), judged=False)
CLOSE = 0.2  # of the range of 1: how far the colour of a border may be from the one asked for
SIDES = {"left": (0.0, 0.0, 0.5, 1.0), "right": (0.5, 0.0, 1.0, 1.0)}


@dataclass(frozen=True)
class Asked:
    """Pictures of held-out sprites that are told by a reference alone, each on a background that
    the text names."""

    words: Sequence[str]
    colours: Sequence[str]

    @classmethod
    def of(cls, quick: bool) -> Asked:
        sprites = HELD_OUT[:2] if quick else HELD_OUT
        words = [word for word in sprites for _ in range(1 if quick else EACH)]
        names = list(COLOURS)
        return cls(words, [names[(3 * i + 1) % len(names)] for i in range(len(words))])

    @property
    def prompts(self) -> list[str]:
        return [f"an object on {article(colour)} background" for colour in self.colours]

    @cached_property
    def references(self) -> Tensor:
        """(n, 1, 3, 64, 64), each on another colour than is asked for."""
        every = zip(self.words, self.colours, strict=True)
        drawn = [alone(word, (9, i), other_than=own) for i, (word, own) in enumerate(every)]
        return torch.stack([to_tensor(Image.fromarray(picture)) for picture in drawn])[:, None]


def judge() -> Judge:
    return Judge(DATA / TINY / "clip")


def named(pictures: Tensor, words: Sequence[str]) -> Share:
    """Pictures that the judge, choosing among all sprites, names as the reference's."""
    found = judge().named(pictures, ALL)
    return share(one == word for one, word in zip(found, words, strict=True))


def on_background(pictures: Tensor, colours: Sequence[str]) -> Share:
    """Pictures whose border has the colour of the text, at most `CLOSE` away in its median."""
    border = torch.cat([pictures[..., :3, :].flatten(2), pictures[..., -3:, :].flatten(2)], 2)
    seen = border.median(2).values / 2 + 0.5
    wanted = torch.from_numpy(np.stack([background(name)[0, 0] for name in colours]))
    return share((own <= CLOSE) for own in (seen - wanted).abs().amax(1).tolist())


def painted(model: object, asked: Asked, quick: bool, *, told: bool = True) -> Tensor:
    settings = Sampling(steps=2, guidance=4.0) if quick else SHOWN
    inputs = {"reference": asked.references} if told else {}
    seeds = range(1000, 1000 + len(asked.words))
    return sample_many(model, asked.prompts, list(seeds), settings=settings, inputs=inputs)  # type: ignore[arg-type]


def shown(bars: Bars, runs: Runs, run: Run, bar: float) -> None:
    """Held-out sprites by their pictures alone, and the background by the text; beside it the same
    prompts without a picture."""
    runs.make([run])
    model, _ = load_adapted(runs.place(run) / "adapter.safetensors")
    asked = Asked.of(bars.quick)
    pictures = painted(model, asked, bars.quick)
    base = named(painted(model, asked, bars.quick, told=False), asked.words)
    right, obeyed = named(pictures, asked.words), on_background(pictures, asked.colours)
    bars.note(f"{run.name}_minutes", runs.minutes(run))
    bars.note(f"{run.name}_without_a_picture", base)
    if bars.quick:
        bars.note(f"{run.name}_reference_right", right)
        bars.note(f"{run.name}_background_right", obeyed)
        return
    bars.at_least(f"{run.name}_reference_right", right, bar)
    bars.at_least(f"{run.name}_background_right", obeyed, 0.8)
    bars.at_most(f"{run.name}_minutes_of_training", runs.minutes(run), 40)


def ip_adapter(bars: Bars, runs: Runs) -> None:
    shown(bars, runs, UNET, 0.6)


def ip_adapter_dit(bars: Bars, runs: Runs) -> None:
    shown(bars, runs, DIT, 0.5)


def pva(bars: Bars, runs: Runs) -> None:
    shown(bars, runs, PVA, 0.4)


def ip_adapter_export(bars: Bars, runs: Runs) -> None:
    """The largest difference of pixels between our picture and that of the stock pipeline."""
    from transformers import CLIPImageProcessor

    from trainer.export.export import export
    from trainer.export.formats.ip_adapter import ENCODER_FOLDER, EXTRACTOR, FILE

    runs.make([UNET])
    adapter = runs.place(UNET) / "adapter.safetensors"
    asked = Asked(HELD_OUT[:1], ["red"])
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        export(adapter, out, "ip_adapter", say=lambda line: None)
        model, _ = load_adapted(adapter)
        ours = painted(model, asked, bars.quick)[0]
        pipe = load_backbone(backbone_spec(TINY), TINY).pipeline()
        extractor = CLIPImageProcessor.from_pretrained(out / EXTRACTOR)
        pipe.register_modules(feature_extractor=extractor)
        names = {"weight_name": FILE, "image_encoder_folder": ENCODER_FOLDER}
        pipe.load_ip_adapter(str(out), subfolder="", **names)
        pipe.set_progress_bar_config(disable=True)
        side = model.resolution // model.divisor
        shape = (1, model.latent_channels, side, side)
        theirs = pipe(
            asked.prompts[0],
            ip_adapter_image=to_pil(asked.references[0, 0]),
            latents=torch.randn(shape, generator=torch.Generator().manual_seed(1000)),
            num_inference_steps=2 if bars.quick else SHOWN.steps,
            guidance_scale=SHOWN.guidance,
        ).images[0]
    own, other = (np.asarray(each).astype(int) for each in (to_pil(ours), theirs))
    bars.at_most("ip_adapter_stock_picture", int(np.abs(own - other).max()), 2)


def ip_adapter_step(bars: Bars, runs: Runs) -> None:
    """Time of a training step beside LoRA's of rank 8 on the same data, in turns."""
    plain = ("data.count=64", "data.validation=0", "run.batch_size=8")
    lora = ("methods.ip_adapter=null", "methods.lora.rank=8", "methods.lora.sites=all")
    every = {
        "lora": Step(["recipe=ip_adapter", *plain, *lora]),
        "ip_adapter": Step(["recipe=ip_adapter", *plain]),
    }
    timed = interleaved(every, 5 if bars.quick else 31, "lora")
    bars.note("ip_adapter_steps", {name: timed[name] | facts(every[name]) for name in every})
    if not bars.quick:
        bars.at_most("ip_adapter_step_time", 1 / timed["ip_adapter"]["faster"], 1.25)


def paint_with_words(bars: Bars, runs: Runs) -> None:
    """How much of what the judge sees of each of two words is in the half where it is painted,
    intersection over union, beside the same prompts without painting."""
    count = 2 if bars.quick else 32
    pairs = [(KNOWN[(7 * i) % 64], KNOWN[(7 * i + 31) % 64]) for i in range(count)]
    found = {name: [overlap(pair, i, name == "painted", bars.quick) for i, pair in enumerate(pairs)]
             for name in ("plain", "painted")}  # fmt: skip
    means = {name: float(np.mean(values)) for name, values in found.items()}
    bars.note("paint_with_words", means | {"of": count})
    if not bars.quick:
        ratio = means["painted"] / max(means["plain"], 1e-6)
        bars.at_least("paint_with_words_overlap", ratio, 1.4)


def overlap(pair: tuple[str, str], number: int, paints: bool, quick: bool) -> float:
    """Of one picture: the mean of both words."""
    model = load_backbone(backbone_spec(TINY), TINY).eval()
    if paints:
        boxes = dict(zip(pair, (list(box) for box in SIDES.values()), strict=True))
        apply_methods(model, methods_of({"ediff_i": {"boxes": boxes}}), trains=False)
    prompt = f"{article(pair[0])} and {article(pair[1])} on a white background"
    settings = Sampling(steps=2, guidance=4.0) if quick else SHOWN
    picture = sample_many(model, [prompt], [2000 + number], settings=settings)
    return float(np.mean(region_overlaps(picture, pair)))


def region_overlaps(picture: Tensor, pair: tuple[str, str]) -> list[float]:
    """Of each word, the intersection over the union of its half and of what the judge sees of it,
    patch by patch: sum of min over sum of max."""
    seen = judge().shares(picture, list(ALL))[0]
    side = round(len(seen) ** 0.5)
    found = []
    for word, box in zip(pair, SIDES.values(), strict=True):
        region, own = box_region(box, side).flatten(), seen[:, ALL.index(word)]
        found.append(float(own.minimum(region).sum() / own.maximum(region).sum()))
    return found


PARTS: dict[str, Callable[[Bars, Runs], None]] = {
    "ip_adapter": ip_adapter,
    "ip_adapter_dit": ip_adapter_dit,
    "ip_adapter_export": ip_adapter_export,
    "ip_adapter_step": ip_adapter_step,
    "pva": pva,
    "paint_with_words": paint_with_words,
}


def main() -> None:
    parser = parser_of(__doc__, list(PARTS), keeps=True, words=True)
    options = parser.parse_args()
    parts = chosen_of(options.only, list(PARTS), parser)
    bars = Bars("branches", options.quick, update=bool(options.only))
    words = (*(QUICK if options.quick else ()), *options.words)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(options.keep or Path(scratch), words, 4, first=None, threads=2)
        for part in parts:
            PARTS[part](bars, runs)
            bars.write()


if __name__ == "__main__":
    main()
