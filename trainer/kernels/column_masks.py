"""Common attention masks as intervals of hidden rows for each column (FlashMask, arXiv 2410.01359).

A query (row) may attend to a key (column) unless the mask hides it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from trainer.kernels.mask_spec import MaskSpec, from_dense, from_intervals
from trainer.kernels.tiled import blocks


def full_mask(n: int) -> MaskSpec:
    """Nothing hidden."""
    none = torch.zeros(n, dtype=torch.long)
    return from_intervals(n, (none, none))


def causal_mask(n: int) -> MaskSpec:
    """A token attends to itself and to those before it."""
    j = torch.arange(n)
    return from_intervals(n, (j * 0, j))


def sliding_window(n: int, before: int, after: int = 0) -> MaskSpec:
    """A token attends to itself, `before` tokens before it and `after` after it; causal with
    after=0."""
    j = torch.arange(n)
    return from_intervals(n, (j + before + 1, j * 0 + n), (j * 0, j - after))


def document(lengths: Sequence[int]) -> MaskSpec:
    """Packed sequences; each attends only to itself."""
    starts, ends = _bounds(lengths)
    return from_intervals(len(starts), (ends, ends * 0 + len(starts)), (starts * 0, starts))


def causal_document(lengths: Sequence[int]) -> MaskSpec:
    """Packed sequences; each is causal and attends only to itself."""
    starts, ends = _bounds(lengths)
    j = torch.arange(len(starts))
    return from_intervals(len(j), (ends, ends * 0 + len(j)), (j * 0, j))


def share_question(documents: Sequence[tuple[int, Sequence[int]]]) -> MaskSpec:
    """Documents (length of the question, lengths of its answers): causal, and answers do not attend
    to each other."""
    ends, position = [], 0
    for question, answers in documents:
        ends.append(torch.full((question,), position + question + sum(answers)))
        position += question
        for length in answers:
            position += length
            ends.append(torch.full((length,), position))
    end, j = torch.cat(ends), torch.arange(position)
    return from_intervals(position, (end, j * 0 + position), (j * 0, j))


def global_sliding_window(n: int, seen: int, before: int, after: int) -> MaskSpec:
    """A sliding window, where the first `seen` tokens also attend to all and all attend to them."""
    j = torch.arange(n)
    outside = j >= seen
    below = (torch.where(outside, (j + before + 1).clamp(min=seen), n), j * 0 + n)
    above = (j * 0 + seen, torch.where(outside, (j - after).clamp(min=seen), seen))
    return from_intervals(n, below, above)


def causal_blockwise(lengths: Sequence[int]) -> MaskSpec:
    """Causal blocks; each attends only to itself, the last one to all."""
    _, ends = _bounds(lengths)
    j = torch.arange(len(ends))
    last = len(j) - lengths[-1]
    return from_intervals(len(j), (ends, torch.where(ends <= last, last, ends)), (j * 0, j))


def prefix_causal(n: int, prefix: int) -> MaskSpec:
    """The first `prefix` tokens attend to each other, the others are causal."""
    j = torch.arange(n)
    return from_intervals(n, (j * 0, torch.where(j < prefix, 0, j)))


def prefix_document(documents: Sequence[tuple[int, int]]) -> MaskSpec:
    """Packed sequences (prefix, length), each as in `prefix_causal`."""
    starts, ends = _bounds([length for _, length in documents])
    j = torch.arange(len(starts))
    prefixes = torch.cat([torch.full((length,), prefix) for prefix, length in documents])
    above = torch.where(j - starts < prefixes, starts, j)
    return from_intervals(len(j), (ends, ends * 0 + len(j)), (j * 0, above))


def qk_sparse(n: int, queries: tuple[int, int], keys: tuple[int, int]) -> MaskSpec:
    """Causal; the queries of one range attend to nothing, and no query to the keys of another."""
    j = torch.arange(n)
    dropped = (j >= keys[0]) & (j < keys[1])
    below = (torch.maximum(j, torch.tensor(queries[0])), j * 0 + queries[1])
    return from_intervals(n, below, (j * 0, torch.where(dropped, n, j)))


def hash_sparse(buckets: Tensor, order: Tensor | None = None) -> MaskSpec:
    """A token attends to those of its own bucket at or before its own position.

    buckets: (n,) or (b or 1, h or 1, n), sorted; order: the positions of the tokens before
    sorting, ascending within a bucket, as from `buckets.sort(stable=True)`.

    Raises:
        ValueError: they are not sorted so.
    """
    if bool((buckets.diff() < 0).any()):
        raise ValueError("buckets must be ascending; sort the tokens by buckets.sort(stable=True)")
    if order is not None:
        falling = (order.diff() < 0) & (buckets.diff() == 0)
        if bool(falling.any()):
            raise ValueError(
                "order must be ascending within a bucket; sort the tokens with stable=True"
            )
    flat = buckets.contiguous()
    ends = torch.searchsorted(flat, flat, right=True)
    n = buckets.shape[-1]
    j = torch.arange(n).expand_as(ends)
    return from_intervals(n, (ends, ends * 0 + n), (j * 0, j))


def random_eviction(n: int, seed: int, share: float = 0.5) -> MaskSpec:
    """Causal; a `share` of the keys is hidden from a random later row on, as if evicted from a
    cache."""
    generator = torch.Generator().manual_seed(seed)
    j = torch.arange(n)
    evicted = torch.rand(n, generator=generator) < share
    stays = (torch.rand(n, generator=generator) * (n - j)).long()
    return from_intervals(n, (torch.where(evicted, j + 1 + stays, n), j * 0 + n), (j * 0, j))


def windows(n: int, size: int) -> MaskSpec:
    """Windows of `size` adjacent tokens; each attends only to itself. The last may be shorter."""
    return document([part.stop - part.start for part in blocks(n, size)])


def regions(labels: Tensor) -> MaskSpec:
    """A token attends to those with the same label. labels: (n,), equal ones adjacent.

    Raises:
        ValueError: equal labels are not adjacent.
    """
    same, lengths = labels.unique_consecutive(return_counts=True)
    if len(same) > len(labels.unique()):
        raise ValueError(
            "a region is in several pieces; sort the tokens by labels.sort(stable=True) first, and "
            "the output back"
        )
    return document(lengths.tolist())


def frames(tokens: int, sees: Sequence[Sequence[int]]) -> MaskSpec:
    """A clip of len(sees) frames with `tokens` tokens each: frame i attends to the frames sees[i].

    Raises:
        ValueError: `sees` names a frame that does not exist, or a frame is hidden from more than
            two runs of frames.
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
    """For `frames`: every frame attends to the first and to the previous one, as in
    Tune-A-Video (arXiv 2212.11565)."""
    return [[0, max(0, frame - 1)] for frame in range(count)]


def _bounds(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Start and end of the document of each token."""
    edges = list(accumulate(lengths, initial=0))
    pairs = [(torch.full((b - a,), a), torch.full((b - a,), b)) for a, b in pairwise(edges)]
    starts, ends = (torch.cat(side) for side in zip(*pairs, strict=True))
    return starts, ends
