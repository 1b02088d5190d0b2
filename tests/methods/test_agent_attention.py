"""Agent attention in a denoiser: trained with pooled agents, untrained with merged tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext, use
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.token_merging import match
from trainer.methods.apply import Plan, apply_methods

Predict = Callable[[Any], Tensor]
TRAIN = {"selective": {}}


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"agent_attention": options, **TRAIN}))


def test_as_many_agents_as_tokens_start_as_two_softmaxes(tiny: Any, predict: Predict) -> None:
    """softmax(q q^T) softmax(q k^T) v where side is that of the grid."""
    sites = [site for site in tiny.sites if site.kind == "self" and site.divisor == 1]
    add(tiny, sites="self & /1", side=8)
    seen: list[tuple[Tensor, ...]] = []
    for site in sites:
        (op,) = tiny.host.processors[site.name].ops

        def kernel(*given: Any, run: Any = op.kernel, **more: Any) -> Tensor:
            seen.append((*given, run(*given, **more)))
            return seen[-1][3]

        op.kernel = kernel
    predict(tiny)
    assert len(seen) == len(sites)
    for q, k, v, o in seen:
        scale = q.shape[-1] ** -0.5
        hops = [(q @ x.transpose(2, 3) * scale).softmax(-1) for x in (q, k)]
        torch.testing.assert_close(o, hops[0] @ (hops[1] @ v), atol=1e-5, rtol=1e-4)


def test_biases_and_shortcut_train(tiny: Any, predict: Predict) -> None:
    plan = add(tiny, side=2)
    own = [name for name in plan.names if ".agent_attention." in name]
    assert len(own) == 8 * sum(site.kind == "self" for site in tiny.sites)
    predict(tiny).square().sum().backward()
    parameters = dict(tiny.named_parameters())
    assert all(bool(parameters[name].grad.any()) for name in own)


def merged_by_a_loop(q: Tensor, x: Tensor, side: int, cell: int, ratio: float, step: int) -> Tensor:
    """Agents (h, m, d) of one row: the queries of tokens merged as in ToMe for diffusion (arXiv
    2303.17604). q (h, n, d), x (n, c) of a grid of side * side tokens, row by row.

    One token of every cell stays, drawn from the step; the `ratio` * n others that are most like
    one of those by cosine are averaged with it; the rest stay, too.
    """
    cells = side // cell
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randint(cell * cell, (cells, cells), generator=generator)
    kept = []
    for row in range(cells):
        for column in range(cells):
            inside = int(drawn[row, column])
            y, across = row * cell + inside // cell, column * cell + inside % cell
            kept.append(y * side + across)
    nearest = {}
    for token in range(side * side):
        if token not in kept:
            likeness = [float(torch.cosine_similarity(x[token], x[k], dim=0)) for k in kept]
            best = max(range(len(kept)), key=likeness.__getitem__)
            nearest[token] = (likeness[best], kept[best])
    order = sorted(nearest, key=lambda token: -nearest[token][0])
    goes = order[: int(ratio * side * side)]
    agents = [q[:, token] for token in order if token not in goes]
    for k in kept:
        group = [k, *(token for token in goes if nearest[token][1] == k)]
        agents.append(q[:, group].mean(1))
    return torch.stack(agents, 1)


@pytest.mark.parametrize(("cell", "ratio", "scale"), [(2, 0.7, None), (4, 0.95, 0.2)])
def test_agent_sd_is_what_a_loop_gives(
    cell: int, ratio: float, scale: float | None, tiny: Any, predict: Predict
) -> None:
    """softmax(q a^T s^0.3) softmax(a k^T s) v + 0.075 v, s = d^-0.5 or the site's own, in the first
    part of the steps, with tokens that stay drawn anew at each, by what the layer gets."""
    add(tiny, sites="self & /1", agents="merged", cell=cell, ratio=ratio, merge=0)
    seen: list[tuple[Tensor, ...]] = []
    given: list[Tensor] = []
    for site in (site for site in tiny.sites if site.kind == "self" and site.divisor == 1):
        site.module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        if scale is not None:
            site.module.scale_qk, site.module.scale = False, scale
        (op,) = tiny.host.processors[site.name].ops

        def kernel(*args: Any, run: Any = op.kernel, **more: Any) -> Tensor:
            seen.append((*args[:3], run(*args, **more)))
            return seen[-1][3]

        op.kernel = kernel
    for step in (0, 1, 3):
        seen.clear()
        given.clear()
        with torch.no_grad(), use(StepContext(step, 10, torch.tensor(0))):
            predict(tiny)
        assert len(seen) == len(given) == 3
        for (q, k, v, o), x in zip(seen[:2], given, strict=False):
            s = q.shape[-1] ** -0.5 if scale is None else scale
            for row in range(2):
                a = merged_by_a_loop(q[row], x[row], 8, cell, ratio, step)
                asked = (a @ k[row].mT * s).softmax(-1) @ v[row]
                wanted = (q[row] @ a.mT * s**0.3).softmax(-1) @ asked + 0.075 * v[row]
                torch.testing.assert_close(o[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [None, 0.2])
def test_pooled_agents_are_what_a_loop_gives(
    scale: float | None, tiny: Any, randomise: Callable[..., None]
) -> None:
    """softmax(q a^T s + B2) softmax(a k^T s + B1) v + DWC(v), head by head, a the means of q over
    the quarters of the grid, arXiv 2312.08874, section 3.3."""
    plan = add(tiny, sites="self & /1", side=2)
    randomise(tiny, plan, 0.5)
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 1)
    if scale is not None:
        site.module.scale_qk, site.module.scale = False, scale
    (op,) = tiny.host.processors[site.name].ops
    s = site.head_dim**-0.5 if scale is None else scale
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, site.heads, 64, site.head_dim, generator=generator) for _ in range(3))
    with torch.no_grad():
        o = op.kernel(
            q,
            k,
            v,
            mask=None,
            call=SiteCall(site, StepContext(0, 1, torch.tensor(0), latent_size=(8, 8))),
        )
        weight, bias = op.shortcut.weight, op.shortcut.bias
        conv = nn.functional.conv2d(
            v[0].mT.reshape(1, -1, 8, 8), weight, bias, padding=1, groups=len(weight)
        )
        local = conv.view(site.heads, site.head_dim, 64).mT
        of_keys, of_queries = op.of_keys((8, 8)), op.of_queries((8, 8))
        for head in range(site.heads):
            image = q[0, head].view(2, 4, 2, 4, -1)
            agents = [image[y, :, x].mean((0, 1)) for y in range(2) for x in range(2)]
            asked = [
                (k[0, head] @ agent * s + of_keys[head, n]).softmax(0) @ v[0, head]
                for n, agent in enumerate(agents)
            ]
            for i in range(64):
                scores = torch.stack(
                    [q[0, head, i] @ a * s + of_queries[head, n, i] for n, a in enumerate(agents)]
                )
                wanted = scores.softmax(0) @ torch.stack(asked) + local[head, i]
                torch.testing.assert_close(o[0, head, i], wanted, rtol=1e-4, atol=1e-4)


def test_merged_agents_serve_early_steps_of_a_sampler_only(tiny: Any, predict: Predict) -> None:
    base = predict(tiny)
    plan = add(tiny, agents="merged", cell=2, ratio=0.75, share=0.5, merge=0)
    assert not any("agent_attention" in name for name in plan.names)
    assert torch.equal(predict(tiny), base)

    def at(step: int, of: int) -> Tensor:
        with use(StepContext(step, of, torch.tensor(0))):
            return predict(tiny)

    early = at(0, 10)
    assert bool(early.isfinite().all()) and not torch.allclose(early, base, atol=1e-5)
    assert not torch.equal(at(4, 10), base)
    assert torch.equal(at(5, 10), base)


def test_merged_agents_that_save_nothing_are_not_used(tiny: Any, predict: Predict) -> None:
    base = predict(tiny)
    add(tiny, agents="merged", ratio=0.5, merge=0)
    with use(StepContext(0, 10, torch.tensor(0))):
        assert torch.equal(predict(tiny), base)


def test_keys_of_others_are_refused(tiny: Any, predict: Predict) -> None:
    add(tiny, sites="cross", side=2)
    with pytest.raises(ValueError, match=r"methods\.agent_attention needs the tokens of .* choose"):
        predict(tiny)


def test_merged_agents_cannot_be_distilled() -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"agent_attention": {"agents": "merged", "distill": 1}})
    assert "merged agents learn nothing, so distill has no use; leave it out" in str(error.value)


def groups_by_a_loop(x: Tensor, side: int, cell: int, ratio: float, step: int) -> list[list[int]]:
    """The tokens that attention sees, each as the tokens it is the mean of."""
    found = match(x[None], (side, side), cell=cell, seed=step)
    targets = found.targets.tolist()
    likeness = torch.cosine_similarity(x[:, None], x[None, targets], dim=-1)
    best = {i: int(likeness[i].argmax()) for i in range(side * side) if i not in targets}
    order = sorted(best, key=lambda i: -float(likeness[i, best[i]]))
    goes = order[: int(ratio * side * side)]
    rest = [[i] for i in order if i not in goes]
    into = [[j, *(i for i in goes if targets[best[i]] == j)] for j in targets]
    return rest + into


def test_a_site_of_unknown_grid_does_not_stand_for_the_finest(tiny: Any) -> None:
    sites = tiny.host.sites
    own = next(site for site in sites if site.kind == "self")
    sites[:] = [replace(x, divisor=None if x is own else 2 * x.divisor) for x in sites]
    add(tiny, agents="merged")
    wanted = [site.name for site in tiny.sites if site.kind == "self" and site.divisor == 2]
    assert wanted
    assert [name for name, each in tiny.host.processors.items() if each.ops] == wanted


@pytest.mark.parametrize(("step", "cell"), [(0, 4), (3, 4), (4, 2), (9, 2)])
def test_agent_sd_attends_over_merged_tokens_in_every_step(
    step: int, cell: int, tiny: Any, predict: Predict
) -> None:
    """The whole system with its defaults, at the finest sites alone: 40 % of the tokens averaged
    into others, attention over the rest, through agents in the first 40 % of the steps, and each
    merged token has its target's output."""
    add(tiny, agents="merged")
    own = [site.name for site in tiny.sites if site.kind == "self" and site.divisor == 1]
    assert [name for name, each in tiny.host.processors.items() if each.ops] == own
    (op,) = tiny.host.processors[own[0]].ops
    seen: list[tuple[Tensor, ...]] = []
    given: list[Tensor] = []

    def kernel(*args: Any, run: Any = op.kernel, **more: Any) -> Tensor:
        seen.append((*args[:3], run(*args, **more)))
        return seen[-1][3]

    site = next(site for site in tiny.sites if site.name == own[0])
    site.module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    op.kernel = kernel
    with torch.no_grad(), use(StepContext(step, 10, torch.tensor(0))):
        predict(tiny)
    (q, k, v, o), x = seen[0], given[0]
    s = q.shape[-1] ** -0.5
    for row in range(2):
        groups = groups_by_a_loop(x[row], 8, cell, 0.4, step)
        assert len(groups) == 64 - 25
        less = [torch.stack([t[row][:, g].mean(1) for g in groups], 1) for t in (q, k, v)]
        if step < 4:
            a = merged_by_a_loop(q[row], x[row], 8, cell, 0.95, step)
            asked = (a @ less[1].mT * s).softmax(-1) @ less[2]
            found = (less[0] @ a.mT * s**0.3).softmax(-1) @ asked + 0.075 * less[2]
        else:
            found = (less[0] @ less[1].mT * s).softmax(-1) @ less[2]
        for number, group in enumerate(groups):
            for token in group:
                torch.testing.assert_close(o[row][:, token], found[:, number], rtol=1e-4, atol=1e-5)
