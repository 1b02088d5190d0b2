"""Attention masks as intervals of hidden rows for each key column (FlashMask, arXiv 2410.01359)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.kernels.tiled import COLUMNS

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


FLEX_BLOCK = 128
HIDDEN, OPEN, PARTLY = 0, 1, 2


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """Column j is hidden from rows [lts_j, lte_j) and [uts_j, ute_j); all four are int32 (b or 1, h
    or 1, m).

    queries: number of rows n. For a column hidden from all rows, one interval is [0, n).
    """

    queries: int
    lts: Tensor
    lte: Tensor
    uts: Tensor
    ute: Tensor
    _plans: dict[tuple[int, int], list[list[list[tuple[int, int, bool]]]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def keys(self) -> int:
        """Number of columns m."""
        return self.lts.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.lts, self.lte, self.uts, self.ute))

    def to(self, device: torch.device) -> MaskSpec:
        if self.lts.device == device:
            return self
        moved = [x.to(device) for x in (self.lts, self.lte, self.uts, self.ute)]
        return MaskSpec(self.queries, *moved)

    def hidden(self, rows: slice, columns: slice) -> Tensor:
        """A part of the mask (b or 1, h or 1, rows, columns), True where a column is hidden."""
        i = torch.arange(rows.start, rows.stop, device=self.lts.device)[:, None]
        lts, lte, uts, ute = (
            x[..., None, columns] for x in (self.lts, self.lte, self.uts, self.ute)
        )
        return ((lts <= i) & (i < lte)) | ((uts <= i) & (i < ute))

    def dense(self) -> Tensor:
        """The complete mask (b or 1, h or 1, n, m), True where a column is visible."""
        return ~self.hidden(slice(0, self.queries), slice(0, self.keys))

    def kinds(self, rows: int, columns: int) -> Tensor:
        """HIDDEN, OPEN or PARTLY for each block, (b or 1, h or 1, n / rows, m / columns).

        Computed from the extrema over each block of columns; a block that is hidden only by two
        intervals together counts as PARTLY.
        """
        first = torch.arange(0, self.queries, rows, device=self.lts.device)[:, None]
        last = (first + rows).clamp(max=self.queries)
        (ls, le), (us, ue) = (
            [_extrema(x, columns) for x in pair]  # (least, most) of each
            for pair in ((self.lts, self.lte), (self.uts, self.ute))
        )
        hidden = ((first >= ls[1]) & (last <= le[0])) | ((first >= us[1]) & (last <= ue[0]))
        opened = (last <= ls[0]) | (first >= le[1])
        opened &= (last <= us[0]) | (first >= ue[1])
        return torch.where(hidden, HIDDEN, torch.where(opened, OPEN, PARTLY))

    def sparsity(self, rows: int = FLEX_BLOCK, columns: int = FLEX_BLOCK) -> float:
        """The share of blocks that are completely hidden."""
        return float((self.kinds(rows, columns) == HIDDEN).float().mean())

    def plan(self, rows: int, columns: int) -> list[list[list[tuple[int, int, bool]]]]:
        """For each different mask (b h) and block of rows: (first column, last + 1, partly hidden)
        of each run of blocks of one kind, no run longer than a tile."""
        if (rows, columns) not in self._plans:
            tables = self.kinds(rows, columns).flatten(0, 1).tolist()
            longest = max(1, COLUMNS // columns)
            self._plans[rows, columns] = [
                [_runs(line, size=columns, longest=longest, keys=self.keys) for line in table]
                for table in tables
            ]
        return self._plans[rows, columns]

    def block_mask(self, device: torch.device) -> BlockMask:
        """The mask for flex_attention, made from the table of blocks without the complete mask."""
        from torch.nn.attention.flex_attention import BlockMask

        spec = self.to(device)
        kinds = spec.kinds(FLEX_BLOCK, FLEX_BLOCK)
        partly, opened = (_listed(kinds == kind) for kind in (PARTLY, OPEN))
        many_b, many_h = (int(size > 1) for size in self.lts.shape[:2])

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            at = (b * many_b, h * many_h, j)
            below = (spec.lts[at] <= i) & (i < spec.lte[at])
            above = (spec.uts[at] <= i) & (i < spec.ute[at])
            return ~(below | above)

        return BlockMask.from_kv_blocks(
            *partly,
            *opened,
            BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK),
            mask_mod=mask_mod,
            seq_lengths=(self.queries, self.keys),
        )


def _extrema(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Least and most over blocks of the last dimension, (..., 1, blocks)."""
    parts = x.split(size, dim=-1)
    least = torch.stack([part.amin(-1) for part in parts], -1)
    most = torch.stack([part.amax(-1) for part in parts], -1)
    return least[..., None, :], most[..., None, :]


def _runs(line: list[int], *, size: int, longest: int, keys: int) -> list[tuple[int, int, bool]]:
    """One row of `MaskSpec.plan`, from the kinds of its blocks of `size` columns."""
    found: list[tuple[int, int, bool]] = []
    for index, kind in enumerate(line):
        if kind == HIDDEN:
            continue
        start, stop, partly = index * size, min((index + 1) * size, keys), kind == PARTLY
        joins = found and found[-1][1] == start and found[-1][2] == partly
        if joins and start - found[-1][0] < longest * size:
            found[-1] = (found[-1][0], stop, partly)
        else:
            found.append((start, stop, partly))
    return found


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are chosen, and the indices of all blocks, chosen ones first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int(), order.int()


def from_intervals(queries: int, *intervals: tuple[Tensor, Tensor]) -> MaskSpec:
    """A mask from one or two half-open intervals (start, end) of hidden rows for each column.

    Each is (m,) or (b or 1, h or 1, m). Intervals that touch or overlap are joined.
    """
    none = torch.zeros_like(intervals[0][0])
    (ls, le), (us, ue) = intervals if len(intervals) == 2 else (intervals[0], (none, none))
    bounds = (ls, le, us, ue)
    ls, le, us, ue = (x.clamp(0, queries) for x in torch.broadcast_tensors(*bounds))
    # an empty lower interval is put at the end and an empty upper one at the start, so that it does
    # not widen the extrema over a block
    ls, le = (torch.where(ls < le, x, queries) for x in (ls, le))
    us, ue = (torch.where(us < ue, x, 0) for x in (us, ue))
    meet = (us <= le) & (ls <= ue) & (ls < le) & (us < ue)
    start, end = torch.minimum(ls, us), torch.maximum(le, ue)
    ls, le = torch.where(meet, start, ls), torch.where(meet, end, le)
    us, ue = torch.where(meet, 0, us), torch.where(meet, 0, ue)
    everything = (ls == 0) & (le == queries)
    us, ue = torch.where(everything, 0, us), torch.where(everything, queries, ue)
    # a single interval that begins at row 0 is the upper one; one that ends at the last row is the
    # lower one
    rise = (ls == 0) & (us == ue) & (ls < le)
    sink = (ue == queries) & (us > 0) & (ls == le)
    us, ue, ls, le = (
        torch.where(rise, ls, torch.where(sink, 0, us)),
        torch.where(rise, le, torch.where(sink, 0, ue)),
        torch.where(rise, queries, torch.where(sink, us, ls)),
        torch.where(rise, queries, torch.where(sink, ue, le)),
    )
    shape = (1,) * (3 - ls.ndim) + tuple(ls.shape)
    return MaskSpec(queries, *(x.to(torch.int32).reshape(shape) for x in (ls, le, us, ue)))


def from_dense(mask: Tensor) -> MaskSpec:
    """A mask from a bool tensor (..., n, m), True where a row may attend to a column.

    Raises:
        ValueError: a column is hidden in more than two runs of rows.
    """
    mask = mask[(None,) * (4 - mask.ndim)]
    hidden = torch.nn.functional.pad((~mask).int(), (0, 0, 1, 1))
    steps = hidden.diff(dim=2)  # +1 where a run begins, -1 after its end
    runs = (steps == 1).sum(2)
    if int(runs.max()) > 2:
        column = int((runs > 2).any(0).any(0).nonzero()[0])
        raise ValueError(
            f"column {column} is hidden in {int(runs[..., column].max())} runs of rows, and a "
            "FlashMask allows two; sort the tokens so that those which attend to each other are "
            "adjacent, or use the dense mask"
        )
    rows = torch.arange(steps.shape[2], device=mask.device)[:, None]
    number = (steps == 1).cumsum(2)
    found = []
    for run in (1, 2):
        begins, ends = (steps == 1) & (number == run), (steps == -1) & (number == run)
        found.append(tuple((rows * at).sum(2) for at in (begins, ends)))
    return from_intervals(mask.shape[2], (found[1][0], found[1][1]), (found[0][0], found[0][1]))
