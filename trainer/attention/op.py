"""An op is one edit inside an attention site: a `name`, its `traits`, and a method for each stage
it has.

Stages in running order; b batch rows, h heads, n query tokens, m key tokens, d head_dim; `call` is
a `SiteCall`, the last argument of each:

    skip(x, call) -> y or None          b n c    what the layer gives, where the op has it already:
                                                 no stage up to `restore` runs then
    tokens(x, call) -> x                b n c    inputs after the site's own norms; may change n
    context(k_ctx, v_ctx, call)         b m c'   what to_k and to_v get; in self attention x
        -> k_ctx, v_ctx
    project(made, x, role, call)        b m c    what to_k or to_v, its `role` k or v, made of x
        -> made
    kv(q, k, v, call) -> q, k, v        b h . d  after projection and qk-norm; may append keys
    mask(mask, q, k, call) -> mask      to b h n m by broadcast; bool or added; None for no mask
    kernel(q, k, v, mask, call) -> o    b h n d  replaces the softmax attention
    scores(scores, call) -> scores      b h n m  scaled, before mask and softmax
    probs(probs, call) -> probs         b h n m  after mask and softmax
    branch(o, q, call) -> o             b h n d  adds what the same queries find elsewhere
    output(o, call) -> o                b h n d  before to_out
    restore(y, call) -> y               b n c    after to_out, before the residual
    feed(x, call) -> x                  b n c    the input of the feed-forward layer of the block
                                                 around the site; may change n
    fed(y, call) -> y                   b n c    its output; undoes `feed`
    block(x, call) -> x                 b n c    the output of the block around the site

At a joint site, whose queries and keys are text and image, n and m count both from `kv` to `output`
(`call.spans` tells them apart); `tokens` and `restore` get the image tokens, `context` the text,
and `project` what its layer gets, which may be both.

Ops of one site run in the order in which they were installed, except that `restore`, which undoes
`tokens`, and `fed`, which undoes `feed`, run in the reverse order. What two stages of one op share
is kept in `call.scratch(self)`, never on the op. An op with `scores` or `probs` costs its sites the
fused kernel; with a method `gate(q, call) -> bool` only where that returns True. An op that trains
is an `nn.Module`; it is registered under its site as `name`. A stage counts only if the op's class
defines it as a method: a submodule called `mask` is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

STAGES = (
    "skip",
    "tokens",
    "context",
    "project",
    "kv",
    "mask",
    "kernel",
    "scores",
    "probs",
    "branch",
    "output",
    "restore",
    "feed",
    "fed",
    "block",
)
GATE = "gate"


@dataclass(frozen=True)
class Traits:
    """What an op declares of itself; by this the host refuses ops that cannot share a site.

    owner: the method it belongs to, for refusals that name both. masks: its kernel takes a mask.
    more_keys: its kernel takes more keys than queries. appends: its `kv` gives more keys than it
    got. swaps: its kernel may replace attention other than softmax attention, as it is trained to.
    scores: it needs scores or probabilities, which only unfused attention has. grad: it needs
    gradients where a sampler would run without. frames: it needs every frame of a clip to be a row
    of the batch. grid: it takes all tokens of a site as the cells of one picture's grid, or as a
    line of neighbours, which they are not where text is among them. classic: it computes what the
    layer computes from its projections alone, which holds for classic attention only. resizes: it
    changes how many tokens, or rows, the stages after it see. softmax: it takes a map of softmax
    attention by itself, which attention of another kind does not have. hands_over: it keeps tensors
    of one block for a later one, whose gradient is lost where blocks are calculated again.
    """

    owner: str | None = None
    masks: bool = True
    more_keys: bool = True
    appends: bool = False
    swaps: bool = False
    scores: bool = False
    grad: bool = False
    frames: bool = False
    grid: bool = False
    classic: bool = False
    resizes: bool = False
    softmax: bool = False
    hands_over: bool = False


class Op(Protocol):
    """What every op has; its stages are looked up by name, see the table above."""

    @property
    def name(self) -> str: ...

    @property
    def traits(self) -> Traits: ...


def has_stage(op: Op, stage: str) -> bool:
    return callable(getattr(type(op), stage, None))


def by_stage(ops: tuple[Op, ...]) -> dict[str, tuple[Any, ...]]:
    """The ops of each stage in running order, and those with a `gate`."""
    table: dict[str, tuple[Any, ...]] = {
        stage: tuple(op for op in ops if has_stage(op, stage)) for stage in (*STAGES, GATE)
    }
    for undoes in ("restore", "fed"):
        table[undoes] = table[undoes][::-1]
    return table


def label(op: Op) -> str:
    """The op as a user knows it: by its method, where it has one."""
    owner = op.traits.owner
    return f"op {op.name!r}" if owner is None else f"methods.{owner}"
