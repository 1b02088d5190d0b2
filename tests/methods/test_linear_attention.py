"""Linear attention in a denoiser: what runs, what distillation teaches, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.common.seeds import seed_of
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.linear_attention import (
    FEATURES,
    linear_attention,
    orthogonal_gaussian,
    random_features,
)
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.linear_attention import LinearAttentionOp

Predict = Callable[[Any], Tensor]
TRAIN = {"selective": {"sites": "self", "projections": ["q", "k", "v", "out"]}}


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"linear_attention": options, **TRAIN}))


def test_the_chosen_sites_run_the_kernel_and_no_others(tiny: Any, predict: Predict) -> None:
    add(tiny, sites="self & up", features="elu")
    seen: dict[str, tuple[Tensor, ...]] = {}
    for name, processor in tiny.host.processors.items():
        for op in processor.ops:
            run = op.kernel

            def kernel(*given: Any, run: Any = run, name: str = name, **more: Any) -> Tensor:
                seen[name] = (*given, run(*given, **more))
                return seen[name][3]

            op.kernel = kernel
    predict(tiny)
    assert set(seen) == {s.name for s in tiny.sites if s.kind == "self" and s.place == "up"}
    for q, k, v, o in seen.values():
        assert torch.equal(o, linear_attention(q, k, v, FEATURES["elu"]))


@pytest.mark.parametrize(
    "options",
    [
        {"features": "focused", "shortcut": 3},
        {"features": "cos"},
        {"features": "efficient", "sites": "all"},
        {"features": "random", "num_features": 12, "seed": 5},
    ],
    ids=str,
)
def test_every_choice_trains(options: dict[str, Any], tiny: Any, predict: Predict) -> None:
    base = predict(tiny).detach()
    plan = add(tiny, **options)
    output = predict(tiny)
    assert bool(output.isfinite().all()) and not torch.equal(output, base)
    output.square().sum().backward()
    parameters = dict(tiny.named_parameters())
    for name in plan.names:
        grad = parameters[name].grad
        assert grad is not None and bool(grad.isfinite().all()), name
    own = [name for name in plan.names if ".linear_attention." in name]
    assert bool(own) == ("shortcut" in options)


def test_random_features_are_those_of_the_seed(
    tiny: Any, tiny_folder: Path, open_folder: Callable[..., Any], predict: Predict
) -> None:
    found = []
    for seed in (1, 1, 2):
        backbone = open_folder(tiny_folder)
        add(backbone, features="random", seed=seed)
        found.append(predict(backbone).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_distillation_teaches_the_sites_what_they_did(tiny: Any, predict: Predict) -> None:
    plan = add(tiny, distill=1.0)
    loss = plan.edits["linear_attention"].loss
    assert loss is not None
    parameters = dict(tiny.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in plan.names], lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        predict(tiny)
        found = loss(None)
        found.backward()
        optimizer.step()
        losses.append(float(found.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_distils_first_and_then_no_more(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with, two without: seen where the loss is taken."""
    from trainer.ops.distillation import Distillation
    from trainer.training.fit import fit

    seen: list[tuple[float, bool]] = []
    loss = Distillation.loss

    def looked(self: Distillation, step: object) -> Tensor:
        seen.append((self.done, bool(self.terms)))
        return loss(self, step)

    monkeypatch.setattr(Distillation, "loss", looked)
    words = ["recipe=linear_swap", f"backbone={tiny_folder}", "run.steps=4", "run.batch_size=2"]
    words += ["data.count=8", "data.validation=0", "preview.prompts=[]", "run.checkpoint_every=0"]
    words += ["tracker=none", "optim.ema=null", "run.accelerator=cpu"]
    folder = fit(load_recipe(words), tmp_path / "run")
    assert (folder / "adapter.safetensors").exists()
    assert seen == [(0.0, True), (0.25, True), (0.5, False), (0.75, False)]


def test_masks_of_the_model_are_refused_when_they_come(dit: Any, predict: Predict) -> None:
    add(dit, sites="cross")
    with pytest.raises(ValueError) as error:
        predict(dit)
    assert "the model masks keys at" in str(error.value)
    assert "the kernel of methods.linear_attention takes no mask" in str(error.value)


@pytest.mark.parametrize("other", ["agent_attention", "gated_linear", "longlora", "soft"])
def test_two_kernels_of_one_site_are_refused_by_name(other: str, tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of({"linear_attention": {}, other: {}}))
    assert "methods.linear_attention" in str(error.value)
    assert f"methods.{other}" in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "reluu"}, "did you mean relu?"),
        ({"shortcut": 2}, "a convolution keeps the grid with an odd size, as in 3; 0 is none"),
        ({"distill": -1}, "methods.linear_attention.distill=-1"),
        ({"distill_until": 0}, "methods.linear_attention.distill_until=0"),
    ],
)
def test_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"linear_attention": options})
    assert message in str(error.value)


def test_random_features_stand_for_the_scale_of_the_site(tiny: Any) -> None:
    """phi(x) = exp(w x' - |x'|^2 / 2), x' = sqrt(scale) x: the weights of exp(scale q k^T) on the
    mean, arXiv 2009.14794, lemma 1."""
    site = next(site for site in tiny.sites if site.kind == "self")
    width = site.head_dim
    op = LinearAttentionOp(site, "random", num_features=256, seed=3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, site.heads, 5, width, generator=generator) for _ in range(3))
    for scale in (None, 0.04, 0.5):
        if scale is not None:
            site.module.scale_qk, site.module.scale = False, scale
        s = width**-0.5 if scale is None else scale
        o = op.kernel(q, k, v, mask=None, call=SiteCall(site, StepContext(0, 1, torch.tensor(0))))
        for head in range(site.heads):
            for i in range(5):
                weights = torch.zeros(5)
                for j in range(5):
                    of_q, of_k = (
                        (s**0.5 * op.projection @ x - s * x.square().sum() / 2).exp()
                        for x in (q[0, head, i], k[0, head, j])
                    )
                    weights[j] = of_q @ of_k
                wanted = weights @ v[0, head] / weights.sum()
                torch.testing.assert_close(o[0, head, i], wanted, rtol=1e-3, atol=1e-3)


def test_the_shortcut_gives_back_what_is_local(tiny: Any, randomise: Callable[..., None]) -> None:
    """o + DWC(v), FLatten, arXiv 2308.00442, equation 8: each value beside its eight neighbours,
    channel by channel."""
    plan = add(tiny, features="relu", shortcut=3, sites="self & /1")
    randomise(tiny, plan, 0.3)
    site = next(site for site in tiny.sites if site.kind == "self" and site.divisor == 1)
    (op,) = tiny.host.processors[site.name].ops
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, site.heads, 12, site.head_dim, generator=generator) for _ in range(3))
    with torch.no_grad():
        ctx = StepContext(0, 1, torch.tensor(0), latent_size=(3, 4))
        o = op.kernel(q, k, v, mask=None, call=SiteCall(site, ctx))
        weight, bias = op.shortcut.weight, op.shortcut.bias
        for head in range(site.heads):
            weights = q[0, head].relu() @ k[0, head].relu().T
            wanted = weights @ v[0, head] / (weights.sum(1, keepdim=True) + 1e-15)
            for channel in range(site.head_dim):
                own = head * site.head_dim + channel
                image = torch.zeros(5, 6)
                image[1:4, 1:5] = v[0, head, :, channel].view(3, 4)
                for y in range(3):
                    for x in range(4):
                        local = (image[y : y + 3, x : x + 3] * weight[own, 0]).sum() + bias[own]
                        wanted[4 * y + x, channel] += local
            torch.testing.assert_close(o[0, head], wanted, rtol=1e-4, atol=1e-4)


def random_op(tiny: Any, **options: Any) -> LinearAttentionOp:
    site = next(site for site in tiny.sites if site.kind == "self")
    return LinearAttentionOp(site, "random", num_features=12, seed=5, **options)


def test_training_draws_new_features_after_so_many_steps(tiny: Any) -> None:
    """Each draw is a function of the seed and its number; outside training they are the seed's."""
    op, width = random_op(tiny, redraw=3), tiny.sites[0].head_dim
    call = SiteCall(tiny.sites[0], StepContext(0, 1, torch.tensor(0)))
    q, k, v = (torch.randn(1, tiny.sites[0].heads, 5, width) for _ in range(3))
    seen = []
    for step in range(8):
        op.at_step(step)
        op.train()
        draw = step // 3
        seed = seed_of(5, "features", draw) if draw else 5
        features = random_features(orthogonal_gaussian(12, width, seed))
        found = op.kernel(q, k, v, mask=None, call=call)
        assert torch.equal(found, linear_attention(q, k, v, features))
        seen.append(found)
        op.eval()
        assert torch.equal(op.kernel(q, k, v, mask=None, call=call), seen[0])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[3], seen[5])
    assert not torch.equal(seen[2], seen[3]) and not torch.equal(seen[5], seen[6])


def test_a_resumed_run_has_the_features_of_the_step_it_is_at(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Stopped after three of four steps, with a draw every second step: the same to the last bit,
    and another adapter than without new draws."""
    from trainer.training.fit import fit

    random = "methods.linear_attention={sites: self, features: random, num_features: 8"
    words = ["recipe=linear_swap", f"backbone={tiny_folder}", "run.batch_size=2", "data.count=8"]
    words += ["data.validation=0", "preview.prompts=[]", "tracker=none", "run.accelerator=cpu"]
    words += ["optim.ema=null", "optim.schedule=constant", "optim.warmup=0", "run.precision=fp32"]
    words += ["run.checkpoint_every=3", "run.validate_every=0"]

    def run(name: str, redraw: int, steps: int) -> dict[str, Tensor]:
        own = [f"{random}, distill_until: 1, redraw: {redraw}}}", f"run.steps={steps}"]
        folder = fit(load_recipe([*words, *own]), tmp_path / name)
        return load_file(folder / "adapter.safetensors")

    whole = run("whole", 2, 4)
    run("half", 2, 3)
    (tmp_path / "half" / "adapter.safetensors").unlink()
    again, fixed = run("half", 2, 4), run("fixed", 0, 4)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert not all(torch.equal(whole[name], fixed[name]) for name in whole)
