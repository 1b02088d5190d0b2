"""Attention masks as intervals of hidden rows for each key column (FlashMask, arXiv 2410.01359)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.kernels.tiled import COLUMNS, blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


FLEX_BLOCK = 128
HIDDEN, OPEN, PARTLY = 0, 1, 2


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """Columns hidden from rows [lts, lte) and [uts, ute); all four (b or 1, h or 1, m) of int32.

    queries: number of rows n. A column hidden from all rows has both intervals full.
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
        """(b or 1, h or 1, rows, columns), True where a row may not look."""
        i = torch.arange(rows.start, rows.stop, device=self.lts.device)[:, None]
        lts, lte, uts, ute = (
            x[..., None, columns] for x in (self.lts, self.lte, self.uts, self.ute)
        )
        return ((lts <= i) & (i < lte)) | ((uts <= i) & (i < ute))

    def dense(self) -> Tensor:
        """The mask written out, (b or 1, h or 1, n, m), True where a row may look."""
        return ~self.hidden(slice(0, self.queries), slice(0, self.keys))

    def kinds(self, rows: int, columns: int) -> Tensor:
        """(b or 1, h or 1, n / rows, m / columns): HIDDEN, OPEN or PARTLY for each block.

        From the extrema over each block of columns; a block hidden by two intervals together
        counts as PARTLY.
        """
        first = torch.arange(0, self.queries, rows, device=self.lts.device)[:, None]
        last = (first + rows).clamp(max=self.queries)
        (ls, le), (us, ue) = (
            [_extrema(x, columns) for x in pair]  # (least, most) each
            for pair in ((self.lts, self.lte), (self.uts, self.ute))
        )
        hidden = ((first >= ls[1]) & (last <= le[0])) | ((first >= us[1]) & (last <= ue[0]))
        opened = (last <= ls[0]) | (first >= le[1])
        opened &= (last <= us[0]) | (first >= ue[1])
        return torch.where(hidden, HIDDEN, torch.where(opened, OPEN, PARTLY))

    def sparsity(self, rows: int = FLEX_BLOCK, columns: int = FLEX_BLOCK) -> float:
        """The share of blocks that are all hidden."""
        return float((self.kinds(rows, columns) == HIDDEN).float().mean())

    def plan(self, rows: int, columns: int) -> list[list[list[tuple[int, int, bool]]]]:
        """Per own mask (b h) and block of rows: (first column, last + 1, partly hidden) of runs of
        blocks alike, none longer than a tile."""
        if (rows, columns) not in self._plans:
            tables = self.kinds(rows, columns).flatten(0, 1).tolist()
            longest = max(1, COLUMNS // columns)
            self._plans[rows, columns] = [
                [_runs(line, columns, longest, self.keys) for line in table] for table in tables
            ]
        return self._plans[rows, columns]

    def block_mask(self, device: torch.device) -> BlockMask:
        """For flex_attention, from the block table: the mask itself is never written out."""
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


def _runs(line: list[int], size: int, longest: int, keys: int) -> list[tuple[int, int, bool]]:
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
    """How many blocks of each row are chosen, and which, those first."""
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1).int(), order.int()


def from_intervals(queries: int, *intervals: tuple[Tensor, Tensor]) -> MaskSpec:
    """One or two (start, end) per column, (m,) or (b or 1, h or 1, m) each, half open; what meets
    is joined, so that a column hidden by both together is seen to be hidden."""
    none = torch.zeros_like(intervals[0][0])
    (ls, le), (us, ue) = intervals if len(intervals) == 2 else (intervals[0], (none, none))
    ls, le, us, ue = (x.clamp(0, queries) for x in torch.broadcast_tensors(ls, le, us, ue))
    # nothing below is at the end, nothing above at the start: extrema over a block stay useful
    ls, le = (torch.where(ls < le, x, queries) for x in (ls, le))
    us, ue = (torch.where(us < ue, x, 0) for x in (us, ue))
    meet = (us <= le) & (ls <= ue) & (ls < le) & (us < ue)
    start, end = torch.minimum(ls, us), torch.maximum(le, ue)
    ls, le = torch.where(meet, start, ls), torch.where(meet, end, le)
    us, ue = torch.where(meet, 0, us), torch.where(meet, 0, ue)
    everything = (ls == 0) & (le == queries)
    us, ue = torch.where(everything, 0, us), torch.where(everything, queries, ue)
    # a single interval from the first row on is the upper one, one to the last row the lower one
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
    """From a bool mask (..., n, m), True where a row may look.

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
            "FlashMask has two intervals; sort the tokens so that those which see each other are "
            "neighbours, or use the dense mask"
        )
    rows = torch.arange(steps.shape[2], device=mask.device)[:, None]
    number = (steps == 1).cumsum(2)
    found = []
    for run in (1, 2):
        begins, ends = (steps == 1) & (number == run), (steps == -1) & (number == run)
        found.append(tuple((rows * at).sum(2) for at in (begins, ends)))
    return from_intervals(mask.shape[2], (found[1][0], found[1][1]), (found[0][0], found[0][1]))


def full_mask(n: int) -> MaskSpec:
    """Nothing hidden."""
    none = torch.zeros(n, dtype=torch.long)
    return from_intervals(n, (none, none))


def causal_mask(n: int) -> MaskSpec:
    """A token sees itself and those before it."""
    j = torch.arange(n)
    return from_intervals(n, (j * 0, j))


def sliding_window(n: int, before: int, after: int = 0) -> MaskSpec:
    """A token sees itself, `before` tokens before it and `after` after it; causal with after=0."""
    j = torch.arange(n)
    return from_intervals(n, (j + before + 1, j * 0 + n), (j * 0, j - after))


def document(lengths: Sequence[int]) -> MaskSpec:
    """Packed sequences that see themselves only."""
    starts, ends = _bounds(lengths)
    return from_intervals(len(starts), (ends, ends * 0 + len(starts)), (starts * 0, starts))


def causal_document(lengths: Sequence[int]) -> MaskSpec:
    """Packed sequences, causal in each."""
    starts, ends = _bounds(lengths)
    j = torch.arange(len(starts))
    return from_intervals(len(j), (ends, ends * 0 + len(j)), (j * 0, j))


def share_question(documents: Sequence[tuple[int, Sequence[int]]]) -> MaskSpec:
    """Per document (length of the question, lengths of its answers): causal, and answers do not see
    each other."""
    ends, place = [], 0
    for question, answers in documents:
        ends.append(torch.full((question,), place + question + sum(answers)))
        place += question
        for length in answers:
            place += length
            ends.append(torch.full((length,), place))
    end, j = torch.cat(ends), torch.arange(place)
    return from_intervals(place, (end, j * 0 + place), (j * 0, j))


def global_sliding_window(n: int, seen: int, before: int, after: int) -> MaskSpec:
    """A sliding window, and the first `seen` tokens see all and are seen by all."""
    j = torch.arange(n)
    outside = j >= seen
    below = (torch.where(outside, (j + before + 1).clamp(min=seen), n), j * 0 + n)
    above = (j * 0 + seen, torch.where(outside, (j - after).clamp(min=seen), seen))
    return from_intervals(n, below, above)


def causal_blockwise(lengths: Sequence[int]) -> MaskSpec:
    """Causal blocks, each sees itself; the last sees all."""
    _, ends = _bounds(lengths)
    j = torch.arange(len(ends))
    last = len(j) - lengths[-1]
    return from_intervals(len(j), (ends, torch.where(ends <= last, last, ends)), (j * 0, j))


def prefix_causal(n: int, prefix: int) -> MaskSpec:
    """The first `prefix` tokens see each other, the others are causal."""
    j = torch.arange(n)
    return from_intervals(n, (j * 0, torch.where(j < prefix, 0, j)))


def prefix_document(documents: Sequence[tuple[int, int]]) -> MaskSpec:
    """Packed sequences of (prefix, length), each as in `prefix_causal`."""
    starts, ends = _bounds([length for _, length in documents])
    j = torch.arange(len(starts))
    prefixes = torch.cat([torch.full((length,), prefix) for prefix, length in documents])
    above = torch.where(j - starts < prefixes, starts, j)
    return from_intervals(len(j), (ends, ends * 0 + len(j)), (j * 0, above))


def qk_sparse(n: int, queries: tuple[int, int], keys: tuple[int, int]) -> MaskSpec:
    """Causal; the queries of one range see nothing, the keys of another are seen by none."""
    j = torch.arange(n)
    dropped = (j >= keys[0]) & (j < keys[1])
    below = (torch.maximum(j, torch.tensor(queries[0])), j * 0 + queries[1])
    return from_intervals(n, below, (j * 0, torch.where(dropped, n, j)))


def hash_sparse(buckets: Tensor, order: Tensor | None = None) -> MaskSpec:
    """Tokens see those of their own bucket, at or before their own place.

    buckets: (n,) or (b or 1, h or 1, n), sorted; order: where tokens stood before that, rising
    within a bucket, as from `buckets.sort(stable=True)`.
    """
    if bool((buckets.diff() < 0).any()):
        raise ValueError(
            "the buckets of hash_sparse rise; sort the tokens by buckets.sort(stable=True)"
        )
    if order is not None:
        falling = (order.diff() < 0) & (buckets.diff() == 0)
        if bool(falling.any()):
            raise ValueError("order falls within a bucket; sort the tokens with stable=True")
    flat = buckets.contiguous()
    ends = torch.searchsorted(flat, flat, right=True)
    n = buckets.shape[-1]
    j = torch.arange(n).expand_as(ends)
    return from_intervals(n, (ends, ends * 0 + n), (j * 0, j))


def random_eviction(n: int, seed: int, share: float = 0.5) -> MaskSpec:
    """Causal; a `share` of the keys is forgotten from some later row on, as by an evicting
    cache."""
    generator = torch.Generator().manual_seed(seed)
    j = torch.arange(n)
    evicted = torch.rand(n, generator=generator) < share
    stays = (torch.rand(n, generator=generator) * (n - j)).long()
    return from_intervals(n, (torch.where(evicted, j + 1 + stays, n), j * 0 + n), (j * 0, j))


def windows(n: int, size: int) -> MaskSpec:
    """Consecutive windows of `size` tokens, each sees itself; the last may be shorter."""
    return document([part.stop - part.start for part in blocks(n, size)])


def regions(labels: Tensor) -> MaskSpec:
    """Tokens see those with their own label, (n,); equal labels are neighbours.

    Raises:
        ValueError: they are not.
    """
    same, lengths = labels.unique_consecutive(return_counts=True)
    if len(same) > len(labels.unique()):
        raise ValueError(
            "a region is in several pieces; sort the tokens by labels.sort(stable=True) first, and "
            "the output back"
        )
    return document(lengths.tolist())


def frames(tokens: int, sees: Sequence[Sequence[int]]) -> MaskSpec:
    """A clip of len(sees) frames of `tokens` each: frame i sees the frames sees[i].

    Raises:
        ValueError: `sees` names a frame there is not, or a frame is hidden in more than two runs of
            frames.
    """
    count = len(sees)
    table = torch.zeros(count, count, dtype=torch.bool)
    for frame, seen in enumerate(sees):
        for other in seen:
            if not 0 <= other < count:
                raise ValueError(f"frame {frame} sees frame {other}; there are {count}, from 0 on")
            table[frame, other] = True
    spec = from_dense(table)
    sides = [
        x.repeat_interleave(tokens, dim=-1) * tokens
        for x in (spec.lts, spec.lte, spec.uts, spec.ute)
    ]
    return from_intervals(count * tokens, (sides[0], sides[1]), (sides[2], sides[3]))


def sparse_causal(count: int) -> list[list[int]]:
    """Every frame sees the first and the one before it, as in Tune-A-Video; for `frames`."""
    return [[0, max(0, frame - 1)] for frame in range(count)]


def _bounds(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where the document of each token starts, and ends."""
    edges = list(accumulate(lengths, initial=0))
    pairs = [(torch.full((b - a,), a), torch.full((b - a,), b)) for a, b in pairwise(edges)]
    starts, ends = (torch.cat(side) for side in zip(*pairs, strict=True))
    return starts, ends
