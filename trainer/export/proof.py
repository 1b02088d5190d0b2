"""The proof of an export: the adapted model and every reader of the written files are asked the
same question, and their answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.attention.context import StepContext, per_frame, use
from trainer.backbones.placement import CPU, Placement, proving
from trainer.export.find_format import find_format

LIMIT = 1e-5  # the largest difference allowed in the denoiser's output, in fp32
NOISE = 2e-6  # a difference that the order of fp32 sums can make
PROOF_SIDE = 16  # the largest side of the latents
PROOF_FRAMES = 4  # of a clip, for models with temporal layers
Say = Callable[[str], None]


class Probe:
    """A fixed question to any model: the denoiser's output at two noise levels, for a prompt with
    `words` and for an empty one.

    frames: 1 asks for two images, more for two clips of so many frames; placement: where models
    are asked, each of which is on the CPU before and after.
    """

    def __init__(
        self, model: Any, words: Iterable[str], frames: int = 1, *, placement: Placement = CPU
    ) -> None:
        side = min(model.resolution // model.divisor, PROOF_SIDE)
        generator = torch.Generator().manual_seed(0)
        shape = (2 * frames, model.latent_channels, side, side)
        self.placement, device = placement, placement.device
        self.x_t = torch.randn(shape, generator=generator).to(device)
        self.t = torch.tensor([150, 700], device=device).repeat_interleave(frames)
        self.ctx = StepContext(0, 1, self.t, frames=frames)
        self.prompts = [" ".join(("a photo of", *words)), ""]

    @torch.no_grad()
    def __call__(self, model: Any) -> Tensor:
        """The model's output (2 * frames, c, h, w), in fp32 on the CPU."""
        with proving(model, self.placement), use(self.ctx):
            condition = per_frame(model.encode_prompts(self.prompts), self.ctx.frames)
            output: Tensor = model.predict(self.x_t, self.t, condition)
        return output.float().cpu()


def difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; infinite where a value of either is not finite."""
    largest = (one - other).abs().max()
    return float(largest) if torch.isfinite(largest) else float("inf")


@dataclass(frozen=True)
class Proof:
    """What the written files are compared with.

    make_base: makes a new copy of the plain base; wanted: the adapted model's answer to `probe`;
    say: receives each line for the user.
    """

    format_name: str
    make_base: Callable[[], Any]
    probe: Probe
    wanted: Tensor
    say: Say


def prove(proof: Proof, folder: Path, dropped: Sequence[str] = ()) -> None:
    """Checks that every reader of the format makes the adapted model of the files in `folder`.

    An adapter with a small effect must be met within a tenth of its effect, so that a file which
    loads and does nothing never passes.

    dropped: the adapter's tensors that the format has no place for.

    Raises:
        ValueError: a reader fails, or its model's output differs by more than is allowed.
    """
    name = proof.format_name
    for reader, load in find_format(name).readers.items():
        base = proof.make_base()
        effect = difference(proof.probe(base), proof.wanted)
        allowed = min(LIMIT, max(effect / 10, NOISE))
        try:
            model = load(folder, base)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"format={name}: {reader} does not read the file: {error}") from error
        if model is None:
            continue
        found = difference(proof.probe(model), proof.wanted)
        if found > allowed:
            also = f"; it has no place for {dropped[0]}, {len(dropped)} tensors" if dropped else ""
            raise ValueError(
                f"format={name} cannot carry this adapter: read back by {reader}, the output "
                f"differs by {found:.1e} from the model's, and {allowed:.0e} is allowed{also}; "
                "nothing was written. format=merged folds everything into the weights"
            )
        proof.say(
            f"{name}, read back by {reader}: largest difference {found:.1e} (allowed "
            f"{allowed:.0e}; the adapter itself makes {effect:.1e})"
        )


def measure_rounding(proof: Proof, folder: Path, dtype: str) -> None:
    """Reports how much the output changes by the rounding of the files in `folder` to `dtype`.

    Raises:
        ValueError: values are beyond the range of the dtype.
    """
    readers = find_format(proof.format_name).readers.items()
    read = ((reader, load(folder, proof.make_base())) for reader, load in readers)
    reader, model = next((reader, model) for reader, model in read if model is not None)
    found = difference(proof.probe(model), proof.wanted)
    if found == float("inf"):
        raise ValueError(f"dtype={dtype}: some values are beyond its range; use dtype=bfloat16")
    proof.say(f"rounded to {dtype}, read back by {reader}: largest difference {found:.1e}")
