"""The source rows of an edit: beside the others from the same start, told their own texts, changed
by no hook."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from trainer.attention.context import StepContext, current
from trainer.attention.hooks import Prediction, Sampler, SamplingHook, SourceBranch
from trainer.diffusion.edit_source import EditSource, edit_source, groups_of, source_branch
from trainer.diffusion.sampler import prompts_of, sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import apply_methods
from trainer.methods.feature.text2video_zero import Text2VideoZero
from trainer.methods.method import Edit, Method

SOURCE, PROMPT = "a fox on a red background", "a cat on a blue background"


class Edited(Method):
    """A method of hooks that edits a source."""

    kind: ClassVar[Literal["attention"]] = "attention"
    hooks: tuple[Any, ...] = ()

    def apply(self, model: Any) -> Edit:
        return Edit(sampling=self.hooks)


def edited(backbone: Any, **hook: Any) -> None:
    branch = hook.pop("source", SourceBranch())
    hooks = (SamplingHook(source=branch, **hook),)
    apply_methods(backbone, {"edited": Edited(hooks=hooks)}, trains=False)


def settings(guidance: float = 3.0, frames: int = 1, steps: int = 3) -> Sampling:
    return Sampling(steps=steps, guidance=guidance, frames=frames, negative="red" * (guidance > 1))


def latents(backbone: Any, how: Sampling, prompts: list[str], **more: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    keep = lambda _, x: seen.append(x.clone())  # noqa: E731
    sample(
        backbone, prompts, [3 + n for n in range(len(prompts))], settings=how, on_step=keep, **more
    )
    return seen


@pytest.mark.parametrize(("guidance", "frames"), [(3.0, 1), (1.0, 1), (3.0, 2)])
def test_the_source_is_what_its_prompt_alone_gives(guidance: float, frames: int, tiny: Any) -> None:
    """With the seeds, guidance and negative prompt of the edit, whatever hooks do to that."""
    how = settings(guidance, frames)
    plain = latents(tiny, how, [SOURCE, SOURCE])
    seen: list[Tensor] = []
    names: set[str] = set()

    def after_step(x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        assert prediction.source is not None
        seen.append(prediction.source.clone())
        names.update(prediction.outputs)
        assert ctx.rows("source/cond") == ctx.groups.slices["source/cond"]
        return x_t + 1

    edited(tiny, after_step=after_step, before_step=lambda x_t, predict, ctx: x_t - 0.5)
    own = latents(tiny, how, [PROMPT, "a tree"], edited=EditSource(SOURCE))
    for one, other in zip(seen, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    assert not torch.allclose(own[-1], plain[-1], atol=0.1)
    assert names == {f"{b}/{t}" for b in ("source", "target") for t in ("uncond", "cond")
                     if guidance > 1 or t == "cond"}  # fmt: skip


def test_the_edit_is_what_its_prompt_alone_gives_where_no_hook_changes_it(tiny: Any) -> None:
    how = settings()
    plain = latents(tiny, how, [PROMPT])
    edited(tiny)
    for one, other in zip(
        latents(tiny, how, [PROMPT], edited=EditSource(SOURCE)), plain, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_embeddings_of_every_step_are_told_to_the_source_alone(tiny: Any) -> None:
    how, seen = settings(), list[Tensor]()
    texts = ["a tree", "an apple", "a cow"]
    uncond = torch.stack([tiny.encode_prompts([text]).tokens[0] for text in texts]).detach()

    def after_step(x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        assert prediction.source is not None
        seen.append(prediction.source.clone())
        return x_t

    plain = latents(tiny, how, [PROMPT])
    scheduler = tiny.scheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    wanted = []
    with torch.no_grad():
        for text, t in zip(texts, scheduler.timesteps, strict=True):
            u, c = (tiny.predict(x, t[None], tiny.encode_prompts([p])) for p in (text, SOURCE))
            x = scheduler.step(u + 3.0 * (c - u), t, x).prev_sample
            wanted.append(x)
    edited(tiny, after_step=after_step)
    own = latents(tiny, how, [PROMPT], edited=EditSource(SOURCE, inverted=True, uncond=uncond))
    for found, others in ((seen, wanted), (own, plain)):
        for one, other in zip(found, others, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_an_inverted_source_without_embeddings_is_not_guided(tiny: Any) -> None:
    start = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = latents(tiny, settings(1.0), [SOURCE], start=start)
    seen: list[Tensor] = []

    def after_step(x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        assert prediction.source is not None
        seen.append(prediction.source.clone())
        return x_t

    edited(tiny, after_step=after_step)
    latents(tiny, settings(), [PROMPT], start=start, edited=EditSource(SOURCE, inverted=True))
    for one, other in zip(seen, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-4)


def test_texts_are_in_the_order_of_the_groups() -> None:
    how = settings()
    one = EditSource("source")
    assert groups_of(how, one) == (
        "source/uncond", "target/uncond", "source/cond", "target/cond"
    )  # fmt: skip
    found = prompts_of(["a", "b"], [0, 1], how, edited=one)
    assert found == ["red"] * 4 + ["source"] * 2 + ["a", "b"]
    two = EditSource("source", inverted=True)
    assert groups_of(how, two) == ("target/uncond", "source/cond", "target/cond")
    assert prompts_of(["a"], [0], how, edited=two) == ["red", "source", "a"]
    assert groups_of(settings(1.0), one) == ("source/cond", "target/cond")
    assert groups_of(how, None) == how.groups


def test_open_and_close_are_called_once_whatever_happens(tiny: Any) -> None:
    calls: list[Any] = []

    def opened(sampler: Sampler) -> None:
        calls.append((sampler.source_prompt, list(sampler.prompts), sampler.sites == tiny.sites))
        calls.append(sampler.read("a fox").words)

    def fail(x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        raise RuntimeError("no")

    edited(tiny, open=opened, close=lambda sampler: calls.append("closed"), after_step=fail)
    with pytest.raises(RuntimeError, match="no"):
        latents(tiny, settings(), [PROMPT], edited=EditSource(SOURCE))
    assert calls == [(SOURCE, [PROMPT], True), ("a", "fox"), "closed"]


def test_the_source_of_a_method_and_that_of_a_sampling(tiny: Any) -> None:
    assert source_branch(tiny) is None and edit_source(tiny, None, 3) is None
    with pytest.raises(ValueError, match=r"source_prompt='a' is for a method that edits a source"):
        edit_source(tiny, EditSource("a"), 3)
    edited(tiny, source=SourceBranch("a fox", needed=True))
    own = edit_source(tiny, None, 3)
    assert own is not None and own.prompt == "a fox"
    other = EditSource("a cat")
    assert edit_source(tiny, other, 3) is other
    short = EditSource("a", uncond=torch.zeros(4, 32, 128))
    with pytest.raises(ValueError, match=r"of 4 steps, and this sampling has 3; give steps=4"):
        edit_source(tiny, short, 3)


def test_a_method_without_its_source_is_refused_by_name(tiny: Any) -> None:
    edited(tiny, source=SourceBranch(needed=True))
    with pytest.raises(ValueError, match=r"methods\.edited edits a source and is told of none"):
        latents(tiny, settings(), [PROMPT])


def test_a_source_and_a_start_are_refused_by_name(tiny: Any) -> None:
    one = Edited(hooks=(SamplingHook(source=SourceBranch()),))
    says = "methods.text2video_zero and methods.edited both claim the start of sampling of unet"
    with pytest.raises(ValueError, match=says):
        apply_methods(tiny, {"text2video_zero": Text2VideoZero(), "edited": one}, trains=False)


def test_other_solvers_go_with_a_method_that_edits_nothing_now(tiny: Any) -> None:
    edited(tiny)
    how = Sampling(steps=2, guidance=3.0, sampler="euler")
    sample(tiny, [PROMPT], [3], settings=how)
    with pytest.raises(ValueError, match=r"scheduler=euler does not go with methods\.edited"):
        sample(tiny, [PROMPT], [3], settings=how, edited=EditSource(SOURCE))


def test_the_rows_of_a_replayed_source_are_its_trajectory(tiny: Any) -> None:
    """At each step, and in what hooks and the one who watches get after it; others sample on."""
    how, x = settings(), torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    known = {step: x + step for step in range(how.steps + 1)}
    given: list[Tensor] = []
    after: list[Tensor] = []
    watched: list[Tensor] = []

    def combine(prediction: Prediction, ctx: StepContext) -> Tensor:
        assert prediction.source is not None
        given.append(prediction.source.clone())
        return prediction.output

    def after_step(x_t: Tensor, prediction: Prediction, ctx: StepContext) -> Tensor:
        assert prediction.source is not None
        after.append(prediction.source.clone())
        return x_t

    edited(tiny, source=SourceBranch(replays=True), combine=combine, after_step=after_step)
    source = EditSource(SOURCE, inverted=True, trajectory=known,
                        watch=lambda step, x_s: watched.append(x_s.clone()))  # fmt: skip
    latents(tiny, how, [PROMPT, "a tree"], edited=source)
    for step in range(how.steps):
        assert torch.equal(given[step], known[step].repeat(2, 1, 1, 1))
        assert torch.equal(after[step], known[step + 1].repeat(2, 1, 1, 1))
        assert torch.equal(watched[step], after[step])
    tiny.sampling_hooks.clear()
    given.clear()
    edited(tiny, combine=combine)
    latents(tiny, how, [PROMPT], edited=source)
    assert not torch.allclose(given[1], known[1])


def test_a_replay_runs_the_network_over_the_trajectory(tiny: Any) -> None:
    how, x = settings(), torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    known = {step: x * (step + 1) for step in range(how.steps + 1)}
    seen: list[tuple[int, tuple[str, ...], Tensor]] = []

    def note(module: Any, args: Any) -> None:
        ctx = current()
        assert ctx is not None
        seen.append((ctx.step, tuple(ctx.groups.slices), args[0].clone()))

    def run(sampler: Sampler) -> None:
        handle = tiny.denoiser.conv_in.register_forward_pre_hook(note)
        sampler.replay([0, 2])
        handle.remove()
        assert sampler.trajectory is known and torch.equal(sampler.mask("source"), x)
        assert sampler.mask("target") is None

    edited(tiny, open=run)
    source = EditSource(SOURCE, inverted=True, trajectory=known, masks={"source": x})
    latents(tiny, how, [PROMPT], edited=source)
    assert [(step, groups) for step, groups, _ in seen] == [(n, ("source/cond",)) for n in (0, 2)]
    assert all(torch.equal(own, known[step]) for step, _, own in seen)
    with pytest.raises(
        ValueError, match=r"the source has no latents before step 0; invert it with"
    ):
        latents(tiny, how, [PROMPT], edited=EditSource(SOURCE))


def test_a_method_that_reads_an_inversion_needs_one(tiny: Any) -> None:
    edited(tiny, source=SourceBranch(inverts=True))
    with pytest.raises(ValueError, match=r"methods\.edited reads the inversion of its source, and"):
        edit_source(tiny, EditSource(SOURCE), 3)
