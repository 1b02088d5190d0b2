"""T-LoRA on a layer of peft: the rank of a low-rank change falls with the noise of each batch row.

    dW_t = s (B S M_t A - B0 S0 M_t A0),  M_t = diag(1, .., 1, 0, .., 0) with r(t) ones
    r(t) = floor((r - r_min) ((T - t) / T)^p) + r_min

Soboleva et al., arXiv 2507.05964: equations of section 4 with p = 1; LyCORIS has p as an option.
A (r, in), S (r,) and B (out, r) train; A0, S0, B0 are where they start, so dW_t = 0 there, exactly:
both products are calculated alike. Without A0, B0 the change is s B S M_t A, with B zero at first.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from trainer.attention.context import ContextHolder
from trainer.ops.exact import in_float64

Singular = Literal["last", "middle", "principal"]
START = "tlora_start"
UNFOLDABLE = (
    "methods.tlora uses another rank at every timestep, which no single weight and no LoRA file "
    "of another tool can express; use the adapter as it is"
)


@dataclass(frozen=True)
class RankSchedule:
    """r(t) of the module's docstring: `share` is r_min / r, `power` p, `num_timesteps` T."""

    share: float = 0.5
    power: float = 1.0
    num_timesteps: float = 1000

    def ranks(self, t: Tensor, rank: int) -> Tensor:
        """r(t) for timesteps t (n,), as whole numbers (n,) in float64, from r_min to `rank`."""
        least = round(self.share * rank)
        left = (self.num_timesteps - in_float64(t)).clamp(0, self.num_timesteps)
        whole = (rank - least) * left**self.power / self.num_timesteps**self.power
        return whole.floor() + least

    def mask(self, t: Tensor, rank: int) -> Tensor:
        """The diagonals of M_t, (n, rank) in float64."""
        ranks = self.ranks(t, rank)
        first = torch.arange(rank, device=ranks.device) < ranks[:, None]
        return first.to(ranks)


class TimestepRank(LoraVariant):
    """What peft's layer does instead of adding s B A x; one for each layer."""

    def __init__(self, schedule: RankSchedule, holder: ContextHolder) -> None:
        self.schedule, self.holder = schedule, holder

    def forward(  # type: ignore[override]  # peft calls it on the instance it was given
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """x: (rows, ..., in), or of a convolution (rows, in, h, w); result: W0 x."""
        name = active_adapter
        mask = self._mask(x, int(module.r[name]))
        x = module.lora_dropout[name](x)
        first, second = module.lora_A[name], module.lora_B[name]
        change = _product(x, first, module.lora_S[name], second=second, mask=mask)
        if (start := getattr(module, START, None)) is not None:
            change = change - _product(x, start.A, start.S, second=start.B, mask=mask)
        changed: Tensor = result + change * module.scaling[name]
        return changed

    def merge_safe(self, *args: Any, **kwargs: Any) -> NoReturn:  # type: ignore[override]
        raise ValueError(UNFOLDABLE)

    merge_unsafe = unmerge = merge_safe

    def supports_lora_conversion(self) -> bool:
        return False

    def _mask(self, x: Tensor, rank: int) -> Tensor:
        """M_t of each row of x, (rows or 1, rank): one for all layers alike in this."""

        def make() -> Tensor:
            ctx = self.holder.ctx
            t = of_rows(ctx.timestep.reshape(-1), len(x), ctx.frames)
            return self.schedule.mask(t, rank).to(x)

        made: Tensor = self.holder.once((self.schedule, rank, len(x), x.dtype, x.device), make)
        return made


def of_rows(t: Tensor, rows: int, frames: int) -> Tensor:
    """The timestep of each row of a layer's input, (rows,), or (1,) where all have one.

    t (b,): of each row the denoiser was called with. A layer may see more rows than these, or
    fewer, always with those of a clip together: a temporal layer has a row for each place of a
    clip, not for each frame.
    """
    if len(t) in (1, rows):
        return t
    clips = t[::frames]
    if rows % len(clips):
        raise ValueError(
            f"a layer with methods.tlora has {rows} rows for {len(clips)} timesteps, and they "
            "cannot be told apart; leave it out of layers"
        )
    return clips.repeat_interleave(rows // len(clips))


def _product(x: Tensor, first: nn.Module, scale: Tensor, *, second: nn.Module, mask: Tensor) -> Any:
    """B S M_t A x."""
    low = first(x)
    factor = scale * mask
    if isinstance(first, nn.Conv2d):
        factor = factor[:, :, None, None]
    else:
        factor = factor.view(len(factor), *[1] * (low.ndim - 2), -1)
    return second(low * factor.to(low.dtype))


@torch.no_grad()
def install(layer: Any, name: str, *, variant: TimestepRank, factors: Factors | None) -> list[str]:
    """Makes a plain LoRA called `name` on a layer of peft a T-LoRA that starts at `factors`, or,
    without them, with B zero; the names, inside the layer, of what it keeps frozen."""
    first, second = layer.lora_A[name].float(), layer.lora_B[name].float()
    rank, device = layer.r[name], first.weight.device
    scale = torch.ones(rank, device=device)
    if factors is not None:
        first.weight.copy_(factors.A.view_as(first.weight))
        second.weight.copy_(factors.B.view_as(second.weight))
        scale = factors.S.to(device)
    layer.lora_S = nn.ParameterDict({name: nn.Parameter(scale.clone())})
    layer.lora_variant[name] = variant
    layer.unfoldable = UNFOLDABLE
    if factors is None:
        return []
    start = nn.Module()
    start.A, start.B = copy.deepcopy(first), copy.deepcopy(second)
    start.S = nn.Parameter(scale.clone())
    layer.add_module(START, start)
    return [f"{START}.A.weight", f"{START}.B.weight", f"{START}.S"]


@dataclass(frozen=True, eq=False)
class Factors:
    """A (r, in), S (r,), B (out, r) of part of a singular value decomposition, S falling."""

    A: Tensor
    S: Tensor
    B: Tensor


def of_weight(weight: Tensor, rank: int, singular: Singular) -> Factors:
    """Those of a weight (out, in), or of a convolution's (out, in, h, w) with (in h w) as one."""
    u, s, v = torch.linalg.svd(weight.detach().float().flatten(1), full_matrices=False)
    chosen = _part(len(s), rank, singular)
    return Factors(v[chosen], s[chosen], u[:, chosen])


def of_random(
    size: tuple[int, int],
    rank: int,
    singular: Singular,
    *,
    values: MutableMapping[tuple[int, int], Tensor],
) -> Factors:
    """Those of a matrix (out, in) of normal values of deviation 1 / rank.

    Its singular vectors are uniform and independent of its singular values, so they are drawn by
    themselves, by QR, in a hundredth of the time. values: singular values at deviation 1 by size,
    drawn once for all layers of a size, because they alone take O(out in min(out, in)).
    """
    outputs, inputs = size
    if size not in values:
        values[size] = torch.linalg.svdvals(torch.randn(outputs, inputs))
    s = values[size]
    chosen = _part(len(s), rank, singular)
    left, right = (_orthonormal(width, rank) for width in size)
    return Factors(right.T, s[chosen] / rank, left)


def _orthonormal(width: int, count: int) -> Tensor:
    """Uniform orthonormal columns (width, count): QR made unique by the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(width, count))
    return q * r.diagonal().sign()


def _part(count: int, rank: int, singular: Singular) -> slice:
    """Which of `count` falling singular values."""
    starts: Mapping[str, int] = {
        "principal": 0,
        "middle": (count - rank) // 2,
        "last": count - rank,
    }
    return slice(starts[singular], starts[singular] + rank)
