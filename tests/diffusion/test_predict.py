"""One call of the denoiser on groups of rows: each group gets what it would by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.attention.op import Traits
from trainer.attention.rows import Rows
from trainer.attention.sites import select
from trainer.diffusion.predict import predict_groups

NAMES = ("source/cond", "target/uncond", "target/cond")


class Muted:
    """An op that takes away what one group's rows attend to."""

    name = "muted"
    traits = Traits()

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        o = o.clone()
        o[call.ctx.rows("source/cond")] = 0
        return o


@torch.no_grad()
def test_every_group_is_answered_by_its_own_latents_and_text(tiny: Any) -> None:
    source, target = torch.randn(2, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = {
        "source/cond": ["a fox", "a cat"],
        "target/uncond": ["", ""],
        "target/cond": ["an apple", "a tree"],
    }
    t = torch.tensor(400)
    condition = tiny.encode_prompts([text for name in NAMES for text in texts[name]])
    ctx = StepContext(1, 5, t, groups=Rows.of(NAMES, 2))
    found = predict_groups(tiny, {"source": source, "target": target}, condition=condition, ctx=ctx)
    assert list(found) == list(NAMES)
    for name in NAMES:
        x = source if name.startswith("source") else target
        alone = tiny.predict(x, t.expand(2), tiny.encode_prompts(texts[name]))
        torch.testing.assert_close(found[name], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_op_finds_its_group(tiny: Any) -> None:
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = tiny.encode_prompts(["a fox"] * 6)
    ctx = StepContext(0, 1, torch.tensor([400] * 6), groups=Rows.of(NAMES, 2))
    before = predict_groups(tiny, {"source": x, "target": x}, condition=condition, ctx=ctx)
    tiny.host.install(Muted(), select(tiny.sites, "self"))
    after = predict_groups(tiny, {"source": x, "target": x}, condition=condition, ctx=ctx)
    assert torch.equal(after["target/uncond"], before["target/uncond"])
    assert torch.equal(after["target/cond"], before["target/cond"])
    assert not torch.allclose(after["source/cond"], before["source/cond"], atol=1e-3)
