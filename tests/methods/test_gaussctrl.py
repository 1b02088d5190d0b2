"""GaussCtrl's attention against a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_checks import HOW, apart, call_at, latents, loop_attention, outputs, qkv, site_of

from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.methods.apply import apply_methods
from trainer.ops.gaussctrl import AlignedViews, Alignment

GROUPS = ("target/uncond", "target/cond")


@pytest.mark.parametrize("references", [1, 2, 9])
def test_every_view_looks_at_the_references_of_its_half(references: int, tiny: Any) -> None:
    op = AlignedViews(Alignment("gaussctrl", "self", own=0.7, references=references))
    made = qkv(2 * 3, 9)
    found = outputs(op, made, call_at(site_of(tiny), groups=GROUPS, count=3))
    for start, group in zip((0, 3), GROUPS, strict=True):
        for row in range(3):
            q = made[0][start + row]
            own = loop_attention(q, made[1][start + row], made[2][start + row])
            count = min(references, 3)
            seen = sum(
                loop_attention(q, made[1][start + r], made[2][start + r]) for r in range(count)
            )
            torch.testing.assert_close(found[group][row], 0.7 * own + 0.3 * seen / count)


def test_alone_or_at_full_share_it_is_the_picture_itself(tiny: Any, dit: Any) -> None:
    prompts = ["a fox", "a cat"]
    for model in (tiny, dit):
        plain = latents(model, prompts)
        for options, same in (({"own": 1.0}, True), ({"own": 0.5, "references": 1}, False)):
            apply_methods(model, methods_of({"gaussctrl": options}), trains=False)
            found = latents(model, prompts)
            model.sampling_hooks.clear()
            torch.testing.assert_close(found[:1], plain[:1], rtol=0, atol=1e-3)
            assert (apart(found[1], plain[1]) < 1e-3) == same


def test_a_window_without_a_step_is_refused(tiny: Any) -> None:
    apply_methods(tiny, methods_of({"gaussctrl": {"steps": (0.3, 0.4)}}), trains=False)
    with pytest.raises(ValueError, match=r"methods\.gaussctrl: steps=\[0\.3,0\.4\] has none of 4"):
        sample(tiny, ["a fox"], [0], settings=HOW)
