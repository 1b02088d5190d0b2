"""DiTFastAttn: what each way to attend computes, the search for a plan, and the plan's file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import command
from torch import Tensor

from trainer.__main__ import main
from trainer.attention.context import StepContext, use
from trainer.attention.rows import Rows
from trainer.common.exit_codes import BAD_RECIPE
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import Plan, apply_methods
from trainer.methods.function.ditfastattn import attention_left
from trainer.methods.shared.attention_plan import AttentionPlan, weight_sizes
from trainer.ops.reduction.choices import Choice, share_of_attention
from trainer.ops.reduction.ditfastattn import SharedAttention
from trainer.ops.reduction.plan_search import PlanSearch, relative_change

PAIR = Rows.of(("target/uncond", "target/cond"), count=1)
LOOK = Sampling(steps=3, guidance=3.0)


def add(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"ditfastattn": options}), trains=False)


def painted(backbone: Any, settings: Sampling = LOOK) -> Tensor:
    return sample(backbone, ["a fox"], [3], settings=settings)


def heads_out(attn: Any, x: Tensor, side: int | None = None) -> Tensor:
    """What the heads of a layer put out, (n, c), for tokens x (n, c) that see all others, or those
    at most `side` before and after."""
    out = []
    for q, k, v in zip(*(f(x).chunk(attn.heads, -1) for f in (attn.to_q, attn.to_k, attn.to_v)),
                       strict=True):  # fmt: skip
        scores = q @ k.T / q.shape[-1] ** 0.5
        if side is not None:
            i = torch.arange(len(x))
            scores = scores.masked_fill((i[:, None] - i).abs() > side, float("-inf"))
        out.append(scores.softmax(-1) @ v)
    return torch.cat(out, -1)


@pytest.mark.parametrize("choice", ["full", "half", "window", "window_half", "reuse"])
def test_each_choice_is_what_plain_attention_gives(choice: Choice, dit: Any) -> None:
    """At step 1, after a complete step 0; rows are without the prompt and with it."""
    add(dit, pattern=("full", choice), window=0.25)
    site = next(site for site in dit.sites if site.kind == "self")
    attn = site.module
    first, then = torch.randn(2, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():
        for step, x in enumerate((first, then)):
            ctx = StepContext(step, 2, torch.tensor(0), groups=PAIR)
            with dit.host.holder.holding(ctx):
                outputs.append(attn(x))
        whole = [[attn.to_out[0](heads_out(attn, row)) for row in x] for x in (first, then)]
        near = [heads_out(attn, x[1], 2) for x in (first, then)]
        far = [heads_out(attn, x) - heads_out(attn, x, 2) for x in first]
        wanted = {
            "full": whole[1],
            "half": [whole[1][1]] * 2,
            "window": [
                attn.to_out[0](heads_out(attn, x, 2) + r) for x, r in zip(then, far, strict=True)
            ],
            "window_half": [attn.to_out[0](near[1] + far[1])] * 2,
            "reuse": whole[0],
        }[choice]
    torch.testing.assert_close(outputs[0], torch.stack(whole[0]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[1], torch.stack(wanted), atol=1e-5, rtol=1e-4)


def test_sharing_nothing_changes_no_bit(tiny: Any, dit: Any) -> None:
    for model in (tiny, dit):
        base = painted(model)
        add(model, pattern=("full",))
        assert torch.equal(painted(model), base)


def test_a_window_of_everything_changes_no_bit(tiny: Any) -> None:
    base = painted(tiny)
    add(tiny, pattern=("full", "window"), window=1)
    assert torch.equal(painted(tiny), base)


def test_training_is_as_without_it(tiny: Any, predict: Callable[[Any], Tensor]) -> None:
    base = predict(tiny)
    add(tiny, pattern=("full", "reuse"))
    assert torch.equal(predict(tiny), base)
    ctx = StepContext(1, 2, torch.tensor(0), training=True)
    with use(ctx):
        assert torch.equal(predict(tiny), base)


def test_nothing_is_kept_after_a_sampling(dit: Any) -> None:
    add(dit, pattern=("full", "window", "reuse"))
    first = painted(dit)
    (op,) = {id(o): o for p in dit.host.processors.values() for o in p.ops}.values()
    assert not op.outputs and not op.residuals
    assert torch.equal(painted(dit), first)


def test_shares_of_the_flop(dit: Any) -> None:
    found = [
        share_of_attention(c, 0.125) for c in ("full", "half", "window", "window_half", "reuse")
    ]
    assert found == [1, 0.5, 0.125, 0.0625, 0]
    sites = [site for site in dit.sites if site.kind == "self"]
    op = SharedAttention({site.name: ["reuse", "half"] for site in sites}, 0.125)
    assert attention_left(op, sites) == 0.75  # the first step is always complete


def test_the_change_of_an_output() -> None:
    a, b = torch.tensor([2.0, -4.0, 0.0]), torch.tensor([1.0, -5.0, 0.0])
    assert relative_change(a, b) == pytest.approx((1 / 2 + 1 / 5 + 0) / 3, rel=1e-5)


def test_the_search_takes_the_first_choice_below_its_limit() -> None:
    """The change of a choice is its price; limits are a half and the whole of the threshold, and
    the second layer is tried under what was chosen for the first."""
    prices: dict[str, dict[Choice, float]] = {
        "a": {"reuse": 0.5, "window_half": 0.3, "window": 0.04, "half": 0.01, "full": 0.0},
        "b": {"reuse": 0.07, "window_half": 0.04, "window": 0.01, "half": 0.01, "full": 0.0},
    }
    op = SharedAttention({}, 0.25)
    search = PlanSearch(op, ["a", "b"], threshold=0.1)
    search.begin(SimpleNamespace(steps=2))  # type: ignore[arg-type]

    def predict(x_t: Tensor) -> Any:
        assert not op.keeps
        changed = sum(prices[name][op.rules[name][1]] for name in ("a", "b"))
        return SimpleNamespace(outputs={"target/cond": torch.full((4,), 1 - changed)})

    guided = StepContext(1, 2, torch.tensor(0), groups=PAIR)
    search.before_step(torch.zeros(1), predict, guided)
    # a: 0.04 is below 0.05; b: 0.04 + 0.04 is below 0.1, 0.04 + 0.07 is not
    assert op.rules == {"a": ["full", "window"], "b": ["full", "window_half"]}
    assert op.keeps
    alone = StepContext(1, 2, torch.tensor(0), groups=Rows.of(("target/cond",), count=1))
    search.before_step(torch.zeros(1), predict, alone)
    assert op.rules["b"][1] == "window", "no halves where there is one"


@pytest.mark.parametrize(("threshold", "choice"), [(0, "full"), (20, "reuse")])
def test_a_plan_that_is_found_is_read_again(
    threshold: float, choice: str, dit_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    words = [f"backbone={dit_folder}", f"methods.ditfastattn.threshold={threshold}", f"out={out}"]
    words += ["recipe=ditfastattn", "preview.steps=3", "pictures=1"]
    said = command("calibrate", *words)
    assert said.returncode == 0, said.stderr
    found = AttentionPlan.read(out)
    assert set(found.sites.values()) == {("full", choice, choice)} and found.guided
    saved = 0 if choice == "full" else 66.7
    assert f"{saved:.1f} % of the FLOP of attention" in said.stdout
    given = [f"backbone={dit_folder}", f"methods.ditfastattn.plan={out}", "steps=3", "prompt=a fox"]
    done = command("sample", *given, f"out={tmp_path / 'pictures'}")
    assert done.returncode == 0, done.stderr
    again = command("calibrate", *words)
    assert again.returncode and "exists already; name another file" in again.stderr


def plan_for(backbone: Any, **changes: Any) -> dict[str, Any]:
    sites = [site for site in backbone.sites if site.kind == "self"]
    return {
        "format": "attention plan 1",
        "denoiser": type(backbone.denoiser).__name__,
        "steps": 3,
        "guided": True,
        "window": 0.125,
        "threshold": 0.1,
        "sites": {site.name: ["full", "reuse", "half"] for site in sites},
        "weights": weight_sizes(sites),
        "attention_flop": 0.5,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"denoiser": "UNet2DConditionModel"},
            "is for UNet2DConditionModel, and this backbone has",
        ),
        ({"sites": {"blocks.0": ["full"] * 3}}, "is for other layers than are chosen here"),
        ({"steps": 4}, "does not say what transformer_blocks.0.attn1 does at each of 4 steps"),
        ({"weights": {}}, "was made for other weights than this backbone has at"),
        ({"window": 3}, "is no plan of `calibrate`"),
    ],
)
def test_a_plan_for_something_else_is_refused(
    changes: dict[str, Any], message: str, dit: Any, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan_for(dit, **changes)))
    with pytest.raises(ValueError, match=r"methods\.ditfastattn: plan=.*") as error:
        add(dit, plan=str(path))
    assert message in str(error.value)


def test_a_plan_is_for_its_steps_and_for_guidance(dit: Any, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="there is no such file; make one by"):
        add(dit, plan=str(path))
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no plan of `calibrate`"):
        add(dit, plan=str(path))
    path.write_text(json.dumps(plan_for(dit)))
    add(dit, plan=str(path))
    assert painted(dit).isfinite().all()
    with pytest.raises(ValueError, match="is for 3 steps, and 4 are taken; give steps=3"):
        painted(dit, Sampling(steps=4, guidance=3.0))
    with pytest.raises(ValueError, match="there are none: give a guidance above 1"):
        painted(dit, Sampling(steps=3, guidance=1.0))


def test_bad_options_are_refused(tiny: Any, capsys: Any) -> None:
    with pytest.raises(RecipeError, match="begins with reuse, and there is nothing yet"):
        methods_of({"ditfastattn": {"pattern": ["reuse"]}})
    with pytest.raises(ValueError, match="is cross-attention; choose sites=self"):
        add(tiny, sites="cross")
    outs = {f"{'a' * 300}.json": "too long"}
    if Path("/proc/self").exists():  # where root cannot write either
        outs["/proc/plan.json"] = "it cannot be written"
    for out, why in outs.items():
        assert main(["calibrate", "recipe=ditfastattn", f"out={out}"]) == BAD_RECIPE
        assert why in capsys.readouterr().err
    done = command("calibrate", "recipe=lora", "out=plan.json")
    assert done.returncode and "calibrate needs a recipe with one method" in done.stderr
