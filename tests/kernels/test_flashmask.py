"""Masks of column intervals: every type against its definition, every back end against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trainer.kernels import column_masks, mask_spec
from trainer.kernels import flashmask as module
from trainer.kernels.column_masks import causal_mask, full_mask
from trainer.kernels.mask_spec import HIDDEN, OPEN, PARTLY, MaskSpec
from trainer.kernels.softmax import eager

N = 37
LENGTHS = [10, 20, 7]
DOCUMENT = [0] * 10 + [1] * 20 + [2] * 7
QUESTIONS = [(5, [4, 6]), (3, [9, 2, 8])]
# (document, part) of each token, part 0 is the question
ANSWERS = [(d, p) for d, (q, a) in enumerate(QUESTIONS) for p, n in enumerate([q, *a]) for _ in range(n)]  # fmt: skip # noqa: E501
PREFIXES = [(3, 10), (8, 20), (0, 7)]
INSIDE = [place for length in LENGTHS for place in range(length)]
BUCKETS = torch.tensor([0] * 5 + [1] * 13 + [4] * 19)
FRAME = [i // 9 for i in range(36)]
REGION = torch.tensor([3] * 8 + [1] * 20 + [7] * 9)


def _prefix(i: int, j: int) -> bool:
    return DOCUMENT[i] == DOCUMENT[j] and (j <= i or INSIDE[j] < PREFIXES[DOCUMENT[j]][0])


def _answer(i: int, j: int) -> bool:
    same = ANSWERS[i][0] == ANSWERS[j][0] and ANSWERS[j][1] in (0, ANSWERS[i][1])
    return j <= i and same


# mask type -> (the spec, may row i look at column j): the twelve of the paper, then ours
TYPES: dict[str, tuple[MaskSpec, Callable[[int, int], bool]]] = {
    "causal": (causal_mask(N), lambda i, j: j <= i),
    "sliding window": (column_masks.sliding_window(N, 5), lambda i, j: i - 5 <= j <= i),
    "causal document": (
        column_masks.causal_document(LENGTHS),
        lambda i, j: j <= i and DOCUMENT[i] == DOCUMENT[j],
    ),
    "document": (column_masks.document(LENGTHS), lambda i, j: DOCUMENT[i] == DOCUMENT[j]),
    "share question": (column_masks.share_question(QUESTIONS), _answer),
    "global + sliding window": (
        column_masks.global_sliding_window(N, 4, 5, 2),
        lambda i, j: min(i, j) < 4 or i - 5 <= j <= i + 2,
    ),
    "causal blockwise": (
        column_masks.causal_blockwise(LENGTHS),
        lambda i, j: j <= i and (DOCUMENT[i] == 2 or DOCUMENT[i] == DOCUMENT[j]),
    ),
    "prefix causal": (column_masks.prefix_causal(N, 9), lambda i, j: j <= i or (j < 9 and i < N)),
    "prefix document": (column_masks.prefix_document(PREFIXES), _prefix),
    "qk sparse": (
        column_masks.qk_sparse(N, (8, 15), (20, 25)),
        lambda i, j: j <= i and not 8 <= i < 15 and not 20 <= j < 25,
    ),
    "hash sparse": (
        column_masks.hash_sparse(BUCKETS),
        lambda i, j: j <= i and bool(BUCKETS[i] == BUCKETS[j]),
    ),
    "full": (full_mask(N), lambda i, j: True),
    "two-sided window": (column_masks.sliding_window(N, 3, 6), lambda i, j: i - 3 <= j <= i + 6),
    "windows": (column_masks.windows(N, 8), lambda i, j: i // 8 == j // 8),
    "regions": (column_masks.regions(REGION), lambda i, j: bool(REGION[i] == REGION[j])),
    "frames": (
        column_masks.frames(9, column_masks.sparse_causal(4)),
        lambda i, j: FRAME[j] in (0, max(0, FRAME[i] - 1)),
    ),
    "causal frames": (
        column_masks.frames(9, [list(range(i + 1)) for i in range(4)]),
        lambda i, j: FRAME[j] <= FRAME[i],
    ),
}
SPECS = {name: spec for name, (spec, _) in TYPES.items()} | {
    "random eviction": column_masks.random_eviction(N, 1),
    "per batch row": column_masks.hash_sparse(torch.randint(0, 4, (2, 1, N)).sort()[0]),
    "per head": column_masks.hash_sparse(torch.randint(0, 4, (1, 3, N)).sort()[0]),
    "per batch row and head": column_masks.hash_sparse(torch.randint(0, 4, (2, 3, N)).sort()[0]),
}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 8)
    monkeypatch.setattr(module, "BLOCK", 4)
    monkeypatch.setattr(module, "COLUMNS", 12)
    monkeypatch.setattr(mask_spec, "COLUMNS", 12)


@pytest.mark.parametrize("name", TYPES)
def test_intervals_are_the_mask_of_its_definition(name: str) -> None:
    spec, sees = TYPES[name]
    n = spec.queries
    wanted = torch.tensor([[sees(i, j) for j in range(n)] for i in range(n)])
    assert torch.equal(spec.dense()[0, 0], wanted)


def test_an_evicted_key_is_seen_from_itself_to_some_row() -> None:
    seen = column_masks.random_eviction(200, 0).dense()[0, 0]
    for j in range(200):
        rows = seen[:, j].nonzero().flatten().tolist()
        assert rows == list(range(j, rows[-1] + 1))
    gone = ~seen[-1]
    assert 0.3 < float(gone.float().mean()) < 0.6
    assert torch.equal(seen, column_masks.random_eviction(200, 0).dense()[0, 0])
    assert not torch.equal(seen, column_masks.random_eviction(200, 1).dense()[0, 0])


@pytest.mark.parametrize("name", SPECS)
def test_from_dense_is_the_inverse(name: str) -> None:
    mask = SPECS[name].dense()
    assert torch.equal(mask_spec.from_dense(mask).dense(), mask)


@pytest.mark.parametrize("rows", [1, 8, 100])
@pytest.mark.parametrize("name", SPECS)
def test_no_block_is_misjudged(name: str, rows: int) -> None:
    spec = SPECS[name]
    kinds, mask = spec.kinds(rows, 4), spec.dense()
    for i, line in enumerate(mask.split(rows, dim=2)):
        for j, block in enumerate(line.split(4, dim=3)):
            kind = kinds[:, :, i, j]
            assert not (block.any(-1).any(-1) & (kind == HIDDEN)).any()
            assert not (~block.all(-1).all(-1) & (kind == OPEN)).any()


def test_blocks_of_clean_masks_are_all_judged_right() -> None:
    n = 64
    table = causal_mask(n).kinds(8, 8)[0, 0]
    wanted = torch.full((8, 8), HIDDEN)
    wanted[torch.ones(8, 8).tril().bool()] = OPEN
    wanted.fill_diagonal_(PARTLY)
    assert torch.equal(table, wanted)
    assert not (column_masks.windows(n, 16).kinds(8, 8) == PARTLY).any()
    assert not (column_masks.frames(16, column_masks.sparse_causal(4)).kinds(8, 8) == PARTLY).any()
    assert column_masks.windows(n, 16).sparsity(8, 8) == 0.75


@pytest.mark.parametrize("back_end", ["dense", "blockwise"])
@pytest.mark.parametrize("name", SPECS)
def test_back_ends_agree_with_eager(name: str, back_end: str) -> None:
    spec, generator = SPECS[name], torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, 3, spec.queries, 5, generator=generator, dtype=torch.float64)
        for _ in range(3)
    ]
    inputs = [x.requires_grad_() for x in inputs]
    own = module.BACK_ENDS[back_end](*inputs, spec, 0.5)
    wanted = eager(*inputs, spec.dense(), 0.5)
    torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(own.square().sum(), inputs)
    expected = torch.autograd.grad(wanted.square().sum(), inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradcheck() -> None:
    tensors = [torch.randn(1, 1, 13, 2, dtype=torch.float64).requires_grad_() for _ in range(3)]
    spec = column_masks.global_sliding_window(13, 2, 3, 1)
    assert torch.autograd.gradcheck(lambda q, k, v: module.blockwise(q, k, v, spec), tensors)


def test_rows_that_see_nothing_give_zeros() -> None:
    q, k, v = (torch.randn(1, 2, N, 4).requires_grad_() for _ in range(3))
    o = module.blockwise(q, k, v, column_masks.qk_sparse(N, (3, 30), (0, 0)))
    assert not o[:, :, 3:30].any() and o[:, :, :3].any()
    found = torch.autograd.grad(o.sum(), (q, k, v))
    assert all(bool(grad.isfinite().all()) for grad in found)


def test_hidden_tiles_are_not_computed_and_open_ones_not_masked() -> None:
    spec = column_masks.windows(64, 16)  # tiles of 8 rows, up to 12 columns in blocks of 4
    assert spec.plan(8, 4)[0][0] == [(0, 12, False), (12, 16, False)]
    assert spec.plan(8, 4)[0][7] == [(48, 60, False), (60, 64, False)]
    causal = causal_mask(24).plan(8, 4)[0]
    assert causal[2] == [(0, 12, False), (12, 16, False), (16, 24, True)]


def test_a_mask_takes_four_numbers_a_column() -> None:
    assert column_masks.sliding_window(4096, 100, 100).nbytes == 4096 * 4 * 4


def test_more_than_two_runs_are_refused() -> None:
    mask = torch.ones(9, 3, dtype=torch.bool)
    mask[[1, 3, 5], 1] = False
    with pytest.raises(ValueError, match="column 1 is hidden in 3 runs of rows"):
        mask_spec.from_dense(mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: column_masks.regions(torch.tensor([0, 1, 0])),
            "a region is in several pieces; sort",
        ),
        (lambda: column_masks.hash_sparse(torch.tensor([1, 0])), "buckets must be ascending"),
        (
            lambda: column_masks.hash_sparse(torch.tensor([0, 0]), torch.tensor([1, 0])),
            "order must be ascending within a bucket",
        ),
        (
            lambda: column_masks.frames(4, [[0], [2]]),
            "frame 1 sees frame 2; there are 2, from 0 on",
        ),
    ],
)
def test_refused_with_the_mend(make: Callable[[], MaskSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_flex_is_refused_on_a_cpu() -> None:
    q = torch.randn(1, 1, N, 4)
    with pytest.raises(ValueError, match="flex_attention has no backward on a CPU"):
        module.flex(q, q, q, causal_mask(N))


@pytest.mark.parametrize("name", ["causal", "two-sided window", "per batch row and head"])
def test_the_block_mask_of_flex_is_that_of_the_table(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_spec, "FLEX_BLOCK", 4)
    spec = SPECS[name]
    block_mask = spec.block_mask(torch.device("cpu"))
    wanted = spec.kinds(4, 4) != HIDDEN
    assert torch.equal(block_mask.to_dense().bool(), wanted)
    at = [torch.tensor(x) for x in (1, 2, 20, 17)]
    hidden: Tensor = ~spec.dense().expand(2, 3, -1, -1)[1, 2, 20, 17]
    assert bool(block_mask.mask_mod(*at)) != bool(hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [512, 1000])
def test_flex_agrees_on_cuda(n: int) -> None:
    specs = {
        "causal": causal_mask(n),
        "window": column_masks.sliding_window(n, 100, 50),
        "global": column_masks.global_sliding_window(n, 30, 100, 50),
        "eviction": column_masks.random_eviction(n, 0),
        "own": column_masks.hash_sparse(torch.randint(0, 4, (2, 4, n)).sort()[0]),
    }
    for spec in specs.values():
        inputs = [torch.randn(2, 4, n, 64).cuda().requires_grad_() for _ in range(3)]
        own, wanted = module.flex(*inputs, spec), module.dense(*inputs, spec)
        torch.testing.assert_close(own, wanted, rtol=1e-2, atol=1e-2)
        found = torch.autograd.grad(own.square().sum(), inputs)
        expected = torch.autograd.grad(wanted.square().sum(), inputs)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
