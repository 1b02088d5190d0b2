"""Prompt-to-Prompt's op: which maps are whose, at which sites and steps, against loops over rows,
heads and tokens; and the refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.attention.hooks import Prediction
from trainer.attention.rows import Rows
from trainer.ops.editing.word_maps import word_mask
from trainer.ops.p2p import SOURCE, TARGET, MapEdits, PromptToPrompt, Told, mapped_sites, told_of

GROUPS = ("source/uncond", "target/uncond", "source/cond", "target/cond")
TEXT = 9
HEADS = 2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_told(clips: int, blend: bool = False) -> Told:
    """Of random numbers, so that no two tokens are alike."""
    columns = {
        group: (drawn(clips, TEXT, seed=n) > 0.6).float() * float(blend)
        for n, group in enumerate((SOURCE, TARGET))
    }
    return Told(
        mapping=drawn(clips, TEXT, TEXT, seed=3),
        alpha=(drawn(clips, TEXT, seed=4) > 0.5).float(),
        weight=1 + drawn(clips, TEXT, seed=5),
        first=torch.zeros(clips, TEXT, dtype=torch.float64),
        last=torch.tensor([0.5, 0.75, 1.0] * 3, dtype=torch.float64).expand(clips, -1),
        columns=columns,
    )


def call_at(site: Any, step: int, *, frames: int, count: int, groups: Any = GROUPS) -> SiteCall:
    rows = Rows.of(groups, count)
    ctx = StepContext(step, 4, torch.zeros(()), frames=frames, groups=rows, latent_size=(8, 8))
    return SiteCall(site, ctx)


def site_of(tiny: Any, kind: str, divisor: int = 2) -> Any:
    return next(s for s in tiny.sites if s.kind == kind and s.divisor == divisor)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_cross_maps_are_what_loops_over_tokens_give(step: int, frames: int, tiny: Any) -> None:
    clips = 2
    control = PromptToPrompt(MapEdits("p2p", cross=(0, 1)))
    own = control.told = some_told(clips)
    count = clips * frames
    probs = drawn(4 * count, HEADS, 16, TEXT, seed=7)
    call = call_at(site_of(tiny, "cross"), step, frames=frames, count=count)
    before = probs.clone()
    found = control.probs(probs, call)
    assert torch.equal(probs, before)
    rows = call.ctx.groups.slices
    for group in GROUPS[:3]:  # all but the edit's conditional rows
        assert torch.equal(found[rows[group]], before[rows[group]])
    sources, targets = before[rows[SOURCE]], before[rows[TARGET]]
    for row in range(count):
        clip = row // frames
        for j in range(TEXT):
            wanted = targets[row, :, :, j]
            if step / 4 < [0.5, 0.75, 1.0][j % 3]:
                taken = sum(sources[row, :, :, i] * own.mapping[clip, i, j] for i in range(TEXT))
                if not own.alpha[clip, j]:
                    taken = targets[row, :, :, j]
                wanted = taken * own.weight[clip, j]
            torch.testing.assert_close(found[rows[TARGET]][row, :, :, j], wanted)


def test_self_maps_are_the_sources_in_their_steps_and_on_small_grids(tiny: Any) -> None:
    control = PromptToPrompt(MapEdits("p2p", own=(0.25, 0.75), tokens=16))
    control.told = some_told(1)
    site, q = site_of(tiny, "self"), torch.zeros(4, HEADS, 16, 4)
    inside = [control.gate(q, call_at(site, step, frames=1, count=1)) for step in range(4)]
    assert inside == [False, True, True, False]
    assert not control.gate(torch.zeros(4, HEADS, 17, 4), call_at(site, 1, frames=1, count=1))
    probs = drawn(4, HEADS, 16, 32)  # keys of two frames
    call = call_at(site, 1, frames=1, count=1)
    found = control.probs(probs, call)
    assert torch.equal(found[:3], probs[:3]) and torch.equal(found[3], probs[2])


def test_it_asks_for_no_maps_without_a_source_or_outside_its_steps(tiny: Any) -> None:
    """Then its sites keep the fused kernel."""
    control = PromptToPrompt(MapEdits("p2p", cross=(0.0, 0.5), words={"fox": (0.0, 0.75)}))
    site, q = site_of(tiny, "cross"), torch.zeros(4, HEADS, 16, 4)
    assert not control.gate(q, call_at(site, 0, frames=1, count=1))  # nothing was told
    control.told = some_told(1)
    inside = [control.gate(q, call_at(site, step, frames=1, count=1)) for step in range(4)]
    assert inside == [True, True, True, False]
    for groups in (("target/uncond", "target/cond"), ("source/cond",)):
        assert not control.gate(q, call_at(site, 0, frames=1, count=1, groups=groups))
    blending = PromptToPrompt(MapEdits("p2p", cross=None, blend=True, blend_tokens=16))
    blending.told = some_told(1)
    assert blending.gate(q, call_at(site, 3, frames=1, count=1))
    assert not blending.gate(torch.zeros(4, 2, 17, 4), call_at(site, 3, frames=1, count=1))


def predicted(x_t: Tensor, x_s: Tensor) -> Prediction:
    """A denoiser that gives its input back."""

    def same(output: Tensor, x: Tensor) -> Tensor:
        return x

    ones = torch.ones(len(x_t), 1, 1, 1)
    level = (ones, torch.zeros_like(ones))
    return Prediction(x_t, {}, x_t, convert=same, revert=same, find_level=lambda: level, source=x_s)


def test_the_source_stays_outside_the_words_of_both(tiny: Any) -> None:
    """The maps of all steps so far, of each frame by itself, before they were changed."""
    frames, step = 2, 2
    edits = MapEdits("p2p", blend=True, blend_from=0.5, threshold=0.97, blend_tokens=16)
    control = PromptToPrompt(edits)
    control.told = some_told(1, blend=True)
    site = site_of(tiny, "cross")
    sums = {group: torch.zeros(frames, 4, 4) for group in (SOURCE, TARGET)}
    for number in range(step + 1):
        call = call_at(site, number, frames=frames, count=frames)
        probs = drawn(4 * frames, HEADS, 16, TEXT, seed=20 + number) ** 12
        control.probs(probs, call)
        for group in sums:
            own = probs[call.ctx.rows(group)].mean(1)
            for token in control.told.columns[group][0].nonzero().flatten().tolist():
                sums[group] += own[..., token].unflatten(-1, (4, 4))
    x_t, x_s = drawn(frames, 8, 8, 8, seed=1), drawn(frames, 8, 8, 8, seed=2)
    made = predicted(x_t, x_s)
    ctx = call_at(site, step, frames=frames, count=frames).ctx
    found = control.after_step(x_t, made, ctx)
    inside = word_mask(sums[SOURCE], (8, 8), 0.97) | word_mask(sums[TARGET], (8, 8), 0.97)
    assert inside.any() and not inside.all()
    assert torch.equal(found, torch.where(inside.expand_as(x_t), x_t, x_s))
    early = replace(ctx, step=1)
    assert control.after_step(x_t, made, early) is x_t


def test_an_empty_mask_leaves_the_source(tiny: Any) -> None:
    control = PromptToPrompt(MapEdits("p2p", blend=True, blend_from=0, blend_tokens=16))
    control.told = some_told(1)  # no word has columns
    call = call_at(site_of(tiny, "cross"), 0, frames=1, count=1)
    control.probs(drawn(4, HEADS, 16, TEXT), call)
    x_t, x_s = drawn(1, 8, 8, 8), drawn(1, 8, 8, 8, seed=2)
    made = predicted(x_t, x_s)
    assert torch.equal(control.after_step(x_t, made, call.ctx), x_s)


def sampler_of(tiny: Any, source: str | None, *prompts: str, steps: int = 10) -> Any:
    return SimpleNamespace(
        sites=tiny.sites,
        host=tiny.host,
        source_prompt=source,
        prompts=prompts,
        steps=steps,
        read=tiny.prompts.read,
    )


def test_what_is_told_follows_the_prompts(tiny: Any) -> None:
    edits = MapEdits(
        "p2p",
        replace=False,
        cross=(0.1, 0.8),
        words={"cat": (0.0, 0.25)},
        weights={"red": 3.0},
        blend=True,
    )
    read = tiny.prompts.read
    found = told_of(edits, read("an apple"), [read("a red cat"), read("red cat an apple")])
    assert found.mapping.shape == (2, 32, 32)
    assert found.alpha.tolist()[0] == [1, 0, 0, 0] + [1] * 28  # a, red and cat are new
    assert found.alpha.tolist()[1] == [1, 0, 0] + [1] * 29
    assert found.weight[0, 2] == found.weight[1, 1] == 3
    assert float((found.weight - 1).abs().sum()) == 4
    assert (found.first[0, 3], found.last[0, 3]) == (0, 0.25)
    assert (float(found.first[0, 2]), float(found.last[0, 2])) == (0.1, 0.8)
    # articles differ too, and are everywhere
    assert found.columns[SOURCE].nonzero().tolist() == [[0, 2]]
    assert found.columns[TARGET].nonzero().tolist() == [[0, 2], [0, 3], [1, 1], [1, 2]]


def test_words_of_the_mask_may_be_in_one_prompt_alone(tiny: Any) -> None:
    read = tiny.prompts.read
    edits = MapEdits("p2p", replace=False, blend=["fox", "cat", "red background"])
    found = told_of(edits, read("a fox on a red background"), [read("a cat on a blue background")])
    assert found.columns[SOURCE].nonzero().tolist() == [[0, 2], [0, 5], [0, 6]]
    assert found.columns[TARGET].nonzero().tolist() == [[0, 2]]


REFUSED: list[tuple[Mapping[str, Any], str]] = [
    ({"weights": {"dog": 2.0}}, r"the word 'dog' is not in the prompt 'a red cat'; its words are"),
    ({"blend": ["dog"]}, r"the word 'dog' is not in the prompt 'a red cat'"),
    ({"words": {"dog": (0.0, 1.0)}}, r"the word 'dog' is not in the prompt"),
    ({"replace": True}, r"'a fox' has 2 words and the prompt 'a red cat' has 3"),
    ({"cross": (0.01, 0.05)}, r"cross_steps=\[0\.01,0\.05\] has none of 10 steps; give a longer"),
    ({"own": (0.91, 0.99)}, r"self_steps=\[0\.91,0\.99\] has none of 10 steps"),
    ({"words": {"cat": (0.31, 0.39)}}, r"word_steps\.cat=\[0\.31,0\.39\] has none of 10 steps"),
    ({"sites": "joint"}, r"the selector 'joint' matches no attention site"),
]


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_does_not_fit_is_refused_by_name(
    options: Mapping[str, Any], says: str, tiny: Any
) -> None:
    control = PromptToPrompt(MapEdits("p2p", **({"replace": False} | dict(options))))
    with pytest.raises(ValueError, match=rf"methods\.p2p: .*{says}"):
        control.open(sampler_of(tiny, "a fox", "a red cat"))
    control.close(sampler_of(tiny, "a fox"))  # nothing was installed
    assert not any(processor.ops for processor in tiny.host.processors.values())


def test_it_is_at_its_sites_while_an_edit_is_sampled(tiny: Any) -> None:
    control = PromptToPrompt(MapEdits("p2p", sites="cross & up"))
    sampler = sampler_of(tiny, "a fox", "a cat")
    control.open(sampler)
    names = [name for name, hosted in tiny.host.processors.items() if control in hosted.ops]
    assert names == [s.name for s in tiny.sites if s.kind == "cross" and s.place == "up"]
    control.close(sampler)
    assert control.told is None
    assert not any(processor.ops for processor in tiny.host.processors.values())
    control.open(sampler_of(tiny, None, "a cat"))
    assert not any(processor.ops for processor in tiny.host.processors.values())


def test_keys_of_other_methods_are_refused(tiny: Any) -> None:
    control = PromptToPrompt(MapEdits("p2p"))
    control.told = some_told(1)
    site = site_of(tiny, "cross")
    with pytest.raises(ValueError, match=r"edits the maps of 9 text tokens, and .* has 11 keys"):
        control.probs(drawn(4, HEADS, 16, 11), call_at(site, 0, frames=1, count=1))


def test_temporal_attention_is_refused(tiny: Any) -> None:
    from trainer.methods.apply import apply_methods
    from trainer.methods.feature.tune_a_video import TuneAVideo

    apply_methods(tiny, {"tune_a_video": TuneAVideo()})
    with pytest.raises(ValueError, match=r"is temporal attention, whose maps are not those of a"):
        mapped_sites(tiny.sites, "temporal")
