"""ToMe at the layers of a denoiser: the equation, where it acts, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from joint_models import JointBackbone
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.attention.op import Traits
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.token_merging import Groups, match
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.reduction.tome import draw_of

Predict = Callable[[Any], Tensor]
STEP = StepContext(3, 10, torch.tensor(0))


def add(backbone: Any, name: str = "tome", **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({name: options, "selective": {}}))


def at_step(backbone: Any, predict: Predict, ctx: StepContext = STEP) -> Tensor:
    with torch.no_grad(), use(ctx):
        return predict(backbone)


def watched(module: Any) -> list[tuple[Tensor, ...]]:
    """What goes into a layer, and comes out, at each of its runs from here on."""
    seen: list[tuple[Tensor, ...]] = []
    module.register_forward_hook(lambda _, args, output: seen.append((*args, output)))
    return seen


def attended(attn: Any, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer on queries of x (n, c) and keys of a context (m, c'), head by head."""
    q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
    out = []
    for own, keys, values in zip(*(t.chunk(attn.heads, -1) for t in (q, k, v)), strict=True):
        scores = own @ keys.T / own.shape[-1] ** 0.5
        out.append((scores if bias is None else scores + bias).softmax(-1) @ values)
    found: Tensor = attn.to_out[0](torch.cat(out, -1))
    return found


def groups_of(x: Tensor, side: int, ratio: float) -> Groups:
    return match(x, (side, side), cell=2, seed=draw_of(0, STEP)).groups(ratio)


@pytest.mark.parametrize("proportional", [False, True])
def test_a_layer_runs_on_merged_tokens(proportional: bool, tiny: Any, predict: Predict) -> None:
    """y = unmerge(attention(merge(x))), its scores with log s where it is proportional."""
    add(tiny, ratio=0.5, proportional=proportional)
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 1)
    seen = watched(site.module)
    at_step(tiny, predict)
    x, y = seen[0]
    groups = groups_of(x, 8, 0.5)
    for row in range(2):
        found = [x[row, groups.into[row] == g].mean(0) for g in range(32)]
        sizes = torch.bincount(groups.into[row], minlength=32)
        bias = sizes.log() if proportional else None
        with torch.no_grad():
            wanted = attended(site.module, torch.stack(found), torch.stack(found), bias)
        torch.testing.assert_close(y[row], wanted[groups.into[row]], atol=1e-5, rtol=1e-4)


def test_queries_alone_are_merged_in_attention_to_text(tiny: Any, predict: Predict) -> None:
    add(tiny, sites="cross", ratio=0.25, proportional=True)
    site = next(site for site in tiny.sites if site.kind == "cross" and site.divisor == 1)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    site.module.register_forward_hook(
        lambda _, args, kwargs, y: seen.append((args[0], kwargs["encoder_hidden_states"], y)),
        with_kwargs=True,
    )
    at_step(tiny, predict)
    x, text, y = seen[0]
    groups = groups_of(x, 8, 0.25)
    with torch.no_grad():
        found = torch.stack([x[1, groups.into[1] == g].mean(0) for g in range(48)])
        wanted = attended(site.module, found, text[1])
    torch.testing.assert_close(y[1], wanted[groups.into[1]], atol=1e-5, rtol=1e-4)


def test_a_feed_forward_layer_runs_on_merged_tokens(tiny: Any, predict: Predict) -> None:
    add(tiny, sites="self | cross", ratio=0.5, feed_forward=True)
    name = next(site.name for site in tiny.sites if site.kind == "self" and site.divisor == 1)
    layer = tiny.denoiser.get_submodule(name.rpartition(".")[0]).ff
    given: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    inner = watched(layer.net[0])
    back = watched(layer)
    at_step(tiny, predict)
    first = inner[0][0]
    assert first.shape[1] == 32
    assert given[0].shape[1] == 32, "a hook that is registered later sees what the layer gets"
    assert back[0][-1].shape[1] == 64


@pytest.mark.parametrize("name", ["tome", "toma"])
def test_nothing_is_merged_with_ratio_0(name: str, tiny: Any, dit: Any, predict: Predict) -> None:
    for model in (tiny, dit):
        base = at_step(model, predict)
        add(model, name, ratio=0, feed_forward=True, sites="self | cross", proportional=True)
        assert torch.equal(at_step(model, predict), base)


def test_identical_tokens_count_as_often_as_they_are(tiny: Any) -> None:
    """Where tokens that merge are equal, proportional attention is attention over all."""
    plan = add(tiny, ratio=0.5, proportional=True)
    site = next(site for site in tiny.sites if site.name in plan.edits["tome"].sites)
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(1, 4, 4, 16, generator=generator)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    with torch.no_grad(), use(STEP):
        torch.testing.assert_close(site.module(x)[0], attended(site.module, x[0], x[0]))


def test_targets_are_drawn_anew_at_each_step_and_repeated(tiny: Any, predict: Predict) -> None:
    add(tiny, ratio=0.5)
    first, again, later = (
        at_step(tiny, predict, StepContext(step, 10, torch.tensor(0))) for step in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, later)
    train = [StepContext(0, 1, torch.tensor([t]), training=True) for t in (5, 5, 6)]
    drawn = [draw_of(0, ctx) for ctx in train]
    assert drawn[0] == drawn[1] != drawn[2]
    assert draw_of(1, STEP) != draw_of(0, STEP)


def test_only_the_finest_sites_unless_told(tiny: Any, dit: Any) -> None:
    sites = add(tiny).edits["tome"].sites
    own = {site.name for site in tiny.sites if site.kind == "self" and site.divisor == 1}
    assert own and set(sites) == own
    assert len(add(dit).edits["tome"].sites) == 2


def test_it_says_how_many_tokens_it_left(tiny: Any, predict: Predict) -> None:
    edit = add(tiny, ratio=0.5).edits["tome"]
    at_step(tiny, predict)
    assert edit.report is not None
    assert set(edit.report().values()) == {("32 of 64 tokens",)}


def test_bad_options_are_refused() -> None:
    for options, part in (
        ({"ratio": 1}, "methods.tome.ratio=1"),
        ({"ratio": 0.8}, "one token of each cell of 2 x 2 stays, so give at most 0.75"),
        ({"cell": 1}, "methods.tome.cell=1"),
    ):
        with pytest.raises(RecipeError) as error:
            methods_of({"tome": options})
        assert part in str(error.value)


def test_a_site_of_one_token_is_refused(tiny: Any) -> None:
    add(tiny, finest=False)
    x_t = torch.randn(1, 8, 2, 2)
    with pytest.raises(ValueError, match=r"methods\.tome merges tokens, and .* has one; choose"):
        tiny.predict(x_t, torch.tensor([3]), tiny.encode_prompts([""]))


@pytest.mark.parametrize(
    "other", [{"flashmask": {}}, {"agent_attention": {"agents": "merged"}}, {"toma": {}}], ids=str
)
def test_what_needs_every_token_is_refused_beside_it(other: dict[str, Any], tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of({"tome": {}, **other, "selective": {}}))
    assert "needs every token" in str(error.value) and "methods.tome" in str(error.value)


def test_frames_are_not_merged(tiny: Any) -> None:
    tree = {"vdm": {"heads": 2}, "tome": {"sites": "temporal"}}
    with pytest.raises(ValueError, match=r"methods\.tome: .* attends over frames"):
        apply_methods(tiny, methods_of(tree))


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_image_tokens_are_merged_beside_text_after_their_positions(name: str) -> None:
    """At the first joint layer: the image's queries, keys and values are means by the keys' mean
    over heads, the text's are left, and every image token gets what its group got."""
    backbone = JointBackbone(name)
    seen: list[tuple[Tensor, ...]] = []
    site = backbone.sites[0]

    class Reader:
        traits = Traits()

        def __init__(self, name: str) -> None:
            self.name = name

        def kv(self, q: Tensor, k: Tensor, v: Tensor, call: Any) -> tuple[Tensor, Tensor, Tensor]:
            seen.append((q, k, v))
            return q, k, v

        def output(self, o: Tensor, call: Any) -> Tensor:
            seen.append((o,))
            spans.append(call.spans(seen[0][0].shape[2]).image)
            return o

    spans: list[slice] = []
    backbone.host.install(Reader("before"), [site])
    methods_of({"tome": {"sites": "joint", "proportional": True}})["tome"].apply(backbone)
    backbone.host.install(Reader("after"), [site])
    side = 4 * (site.divisor or 1)
    size = (side, side) if name == "flux" else None  # packed latents, whose size a backbone says
    with torch.no_grad(), use(StepContext(3, 10, torch.tensor(0), latent_size=size)):
        backbone.output()
    (q, k, v), (less, _, _), _, (o,) = seen[0], seen[1], seen[2], seen[3]
    image = spans[0]
    side = round((image.stop - image.start) ** 0.5)
    x = k[:, :, image].mean(1)
    groups = match(x, (side, side), cell=2, seed=draw_of(0, STEP)).groups(0.5)
    assert less.shape[2] == q.shape[2] - side * side // 2
    for row in range(len(q)):
        sizes = torch.bincount(groups.into[row])
        parts = []
        for t in (q, k, v):
            means = [t[row, :, image][:, groups.into[row] == g].mean(1) for g in range(len(sizes))]
            rest = t[row, :, : image.start], torch.stack(means, 1), t[row, :, image.stop :]
            parts.append(torch.cat(rest, 1))
        bias = torch.zeros(parts[1].shape[1])
        bias[image.start : image.start + len(sizes)] = sizes.log()
        found = (parts[0] @ parts[1].mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ parts[2]
        own = found[:, image.start : image.start + len(sizes)][:, groups.into[row]]
        torch.testing.assert_close(o[row][:, image], own, atol=1e-5, rtol=1e-4)
