"""What the host makes of every denoiser class of the pinned diffusers, and the page that says so.

python tests/attention/denoiser_page.py > docs/denoisers.md
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, from anywhere

import torch
import torch.nn.functional as F
from attention.denoiser_corpus import CASES, make, outputs, values
from torch import Tensor

from trainer.attention.attention_calls import AttentionCalls
from trainer.attention.call import SiteCall
from trainer.attention.denoiser_traits import UNDECLARED
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.backbones.families import find_family

FAMILIES = {
    "UNet2DConditionModel": "sd",
    "PixArtTransformer2DModel": "pixart",
    "SanaTransformer2DModel": "sana",
}
TITLE = """# Denoisers

Every denoiser class of diffusers {version}, and whether its attention can be hosted: then methods
can change it, and without a method its output is that of diffusers to the bit. Which classes can be
trained is another matter: `python -m trainer list backbones` has them. Made from a tiny model of
each class by

    python tests/attention/denoiser_page.py > docs/denoisers.md

{hosted} of {all} classes are hosted. The others are refused, with the reason that stands here, when
a host is attached to them. Kinds: `self`, `cross`, `joint` (image and text in one sequence) and
`temporal`. They are found from the classes alone; a model's family declares what these do not tell:
where text lies in a sequence, and which `self` layers have text among their tokens too. A method
that must know it is refused where no family declares it.

| class | hosted | attention layers | notes |
| --- | --- | --- | --- |
"""


class Halved:
    """Halves every second channel of V, and counts."""

    name, traits = "halved", Traits()

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        assert q.shape[1] == k.shape[1] == v.shape[1] == call.site.heads
        assert q.shape[3] == call.site.head_dim
        self.calls[call.site.name] += not call.site.native.linear
        v = v.clone()
        v[..., ::2] *= 0.5
        return q, k, v


@dataclass
class Found:
    """refused: why no host attaches, empty where one does. kinds: the number of sites of each kind.
    equal: whether its output is native to the bit, near: to rounding. changed: whether the op at
    every site that takes one changes it; restored: whether it is native after `detach`. stopped:
    how the op, or a forward with it, was refused. unhosted: sites that take no op. unreached: sites
    whose op did not run. outside: what computes values outside all sites. strays: softmax attention
    calls that no site made."""

    refused: str = ""
    kinds: Counter[str] = field(default_factory=Counter)
    equal: bool = False
    near: bool = False
    changed: bool = False
    restored: bool = False
    stopped: str = ""
    unhosted: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    strays: int = 0


@cache
def found(name: str) -> Found:
    """Attaches a host to the tiny model of a class and runs it without an op and with one."""
    case, result = CASES[name], Found()
    model = make(case)
    native = outputs(model, case)
    traits = find_family(FAMILIES[name]).traits if name in FAMILIES else UNDECLARED
    try:
        host = Host.attach(model, traits)
    except ValueError as refusal:
        return Found(refused=str(refusal))
    result.kinds = Counter(site.kind for site in host.sites)
    plain = outputs(model, case)
    result.equal, result.near = same(plain, native), close(plain, native)
    inside = tuple(f"{site.name}." for site in host.sites)
    result.outside = [value for value in values(model) if not value.startswith(inside)]
    result.unhosted = [site.name for site in host.sites if site.name not in host.processors]
    _with_an_op(model, case, host=host, result=result)
    host.detach()
    result.restored = same(outputs(model, case), native)
    return result


def _with_an_op(model: Any, case: Any, *, host: Host, result: Found) -> None:
    op, calls = Halved(), Counter[str]()
    try:
        host.install(op, [site for site in host.sites if site.name in host.processors])
    except ValueError as refusal:
        result.stopped = str(refusal)
        return
    before = outputs_or_refusal(model, case, result)
    result.unreached = [p.site.name for p in host.processors.values() if not p.reached]
    if before is None:
        return
    op.calls.clear()
    with AttentionCalls(partial(_counted, calls)):
        after = outputs(model, case)
    result.strays = calls["all"] - sum(op.calls.values())
    host.remove(op)
    result.changed = not same(after, outputs(model, case))


def _counted(calls: Counter[str], *args: Any, **kwargs: Any) -> Tensor:
    calls["all"] += 1
    return F.scaled_dot_product_attention(*args, **kwargs)


def outputs_or_refusal(model: Any, case: Any, result: Found) -> list[Tensor] | None:
    try:
        return outputs(model, case)
    except (ValueError, RuntimeError) as refusal:
        result.stopped = str(refusal)
        return None


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(one, other, strict=True))


def page() -> str:
    """The page as Markdown."""
    import diffusers

    results = {name: found(name) for name in sorted(CASES)}
    hosted = sum(not result.refused for result in results.values())
    title = TITLE.format(version=diffusers.__version__, hosted=hosted, all=len(results))
    return title + "".join(_row(name, result) for name, result in results.items())


def _row(name: str, result: Found) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))
    if result.refused:
        why = result.refused.partition(" is not hosted: ")
        return f"| `{name}` | no | | {why[0].replace(chr(39), '`')}: {why[2].partition(';')[0]} |\n"
    notes = []
    if result.unhosted:
        notes.append(f"{len(result.unhosted)} of them attend linearly: ops are refused there")
    if not result.equal:
        notes.append("equal to rounding: its layers run diffusers' older processor")
    if "never reached" in result.stopped:
        notes.append("its forward never runs some of them: ops there are refused")
    elif result.stopped:
        notes.append("attends row by row: ops are refused")
    if result.outside or result.strays:
        notes.append("what pools its condition is no site")
    return f"| `{name}` | yes | {kinds} | {'; '.join(notes)} |\n"


if __name__ == "__main__":
    print(page(), end="")
