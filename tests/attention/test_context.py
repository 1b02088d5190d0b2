"""The step context: what ops see, also in a checkpoint's recompute and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from trainer.attention.call import SiteCall
from trainer.attention.context import BoundCheckpoint, ContextHolder, StepContext, current, use
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.rows import Rows
from trainer.attention.sites import select
from trainer.ops.attention_maps import MapStore

Run = Callable[..., Tensor]
Gradients = Callable[[nn.Module, Tensor], dict[str, Tensor]]


class ByStep(nn.Module):
    """Its output, and so its gradients, depend on the step."""

    name = "by_step"
    traits = Traits()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))
        self.steps: list[int] = []

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        self.steps.append(call.ctx.step)
        return o * self.weight * (1 + call.ctx.step)


class Gain(nn.Module):
    """Reads nothing of the context."""

    name = "gain"
    traits = Traits()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> Any:
        return q, k, v * self.weight


class Carries(Gain):
    """What its last stage does depends on what its first one saw, with a gradient."""

    name = "carries"

    def context(self, k_ctx: Tensor, v_ctx: Tensor, call: SiteCall) -> tuple[Tensor, Tensor]:
        call.scratch(self)["mean"] = v_ctx.mean(dim=(1, 2))[:, None, None, None]  # b 1 1 1
        return k_ctx, v_ctx

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        return o * (self.weight + call.scratch(self)["mean"])


class Witness:
    name = "witness"
    traits = Traits()

    def __init__(self) -> None:
        self.ctx: list[StepContext] = []

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        self.ctx.append(call.ctx)
        return o


def at(step: int) -> StepContext:
    return StepContext(step, 10, torch.tensor([7, 3]), training=True)


def hosted(model: nn.Module, op: Any) -> Host:
    host = Host.attach(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    host.install(op, select(host.sites, "cross"))
    return host


def test_uses_nest_and_end() -> None:
    assert current() is None
    with use(at(1)) as outer:
        with use(at(2)) as inner:
            assert current() is inner
        assert current() is outer
    assert current() is None


def test_what_all_layers_share_is_made_once_for_a_context_and_compiled_once() -> None:
    holder = ContextHolder()

    def half(x: Tensor, key: str = "half") -> Tensor:
        made: Tensor = holder.once(key, lambda: holder.ctx.timestep / 2)
        return x * made

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(half, backend=counter)
    for t in (2.0, 4.0, 6.0):
        holder.ctx = StepContext(0, 1, torch.tensor(t))
        assert half(torch.ones(())) == t / 2
        assert [compiled(torch.ones(()), key) for key in ("half", "third")] == [t / 2] * 2
        assert holder.once("half", lambda: None) == t / 2
        assert holder.once("other", lambda: None) is None
    assert counter.frame_count == 1


def test_ops_see_the_context_with_the_latent_size(tiny_unet: nn.Module, run_unet: Run) -> None:
    witness = Witness()
    hosted(tiny_unet, witness)
    given = StepContext(4, 9, torch.tensor(3), groups=Rows.of(("target/uncond", "target/cond"), 1))
    with use(given):
        run_unet(tiny_unet)
    seen = witness.ctx[0]
    assert (seen.step, seen.num_steps, seen.latent_size) == (4, 9, (8, 8))
    assert seen.rows("target/cond") == seen.rows("cond") == slice(1, 2)
    with pytest.raises(ValueError, match="'source'; groups of this call: target/uncond, target/co"):
        seen.rows("source")


def test_without_a_context_ops_see_the_call(tiny_unet: nn.Module, run_unet: Run) -> None:
    witness = Witness()
    hosted(tiny_unet, witness)
    run_unet(tiny_unet.train())
    seen = witness.ctx[0]
    assert torch.equal(seen.timestep, torch.tensor([7, 3]))
    assert (seen.step, seen.num_steps, seen.frames) == (0, 1, 1)
    assert (seen.training, seen.latent_size) == (True, (8, 8))
    run_unet(tiny_unet.eval())
    assert witness.ctx[-1].training is False


def test_checkpointed_gradients_are_equal(
    tiny_unet: nn.Module, run_unet: Run, gradients: Gradients
) -> None:
    model: Any = tiny_unet.train()
    op = ByStep()
    hosted(model, op)

    def step() -> dict[str, Tensor]:
        with use(at(3)):
            output = run_unet(model)
        return gradients(model, output)

    expected = step()
    plain_calls = len(op.steps)
    model.enable_gradient_checkpointing()
    op.steps.clear()
    actual = step()
    assert len(op.steps) > plain_calls  # blocks did run again
    assert set(op.steps) == {3}
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], grad) for name, grad in expected.items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_sees_its_own_forward_when_another_came_between(
    tiny_unet: nn.Module, run_unet: Run, gradients: Gradients, reentrant: bool
) -> None:
    model: Any = tiny_unet.train()
    hosted(model, ByStep())

    def step() -> dict[str, Tensor]:
        with use(at(1)):
            first = run_unet(model, seed=1)
        with use(at(5)):
            second = run_unet(model, seed=2)
        run_unet(model, seed=3)  # and one without a context
        return gradients(model, torch.cat([first, second]))

    expected = step()
    model.enable_gradient_checkpointing(
        lambda function, *args: torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=reentrant
        )
    )
    actual = step()
    for name, grad in expected.items():
        # gradients of two forwards are summed in another order
        torch.testing.assert_close(actual[name], grad, atol=1e-5, rtol=1e-4)

    # the plain checkpoint, kept from being bound, does get it wrong
    Host.attach(model).checkpointing.clear()
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, BoundCheckpoint):
            module._gradient_checkpointing_func = function.inner
    off = step()
    assert any(not torch.allclose(off[n], g, atol=1e-3) for n, g in expected.items())


def test_recompute_keeps_a_scratch_of_its_own(
    tiny_unet: nn.Module, run_unet: Run, gradients: Gradients
) -> None:
    """Two forwards before the one backward, whose ops must not read each other's tensors."""
    model: Any = tiny_unet.train()
    op = Carries()
    hosted(model, op)

    def step() -> dict[str, Tensor]:
        return gradients(model, torch.cat([run_unet(model, seed=seed) for seed in (1, 2)]))

    expected = step()
    model.enable_gradient_checkpointing()
    actual = step()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-5, rtol=1e-4)
    assert set(vars(op)) == set(vars(Gain()))  # nothing is left on the op


def test_recompute_stores_no_map_twice(
    tiny_unet: nn.Module, run_unet: Run, gradients: Gradients
) -> None:
    model: Any = tiny_unet.train()
    store = MapStore([1])
    host = hosted(model, store)
    model.enable_gradient_checkpointing()
    output = run_unet(model)
    before = {key: maps.clone() for key, maps in store.maps.items()}
    gradients(model, output)
    assert store.maps.keys() == before.keys()
    assert len(before) == len(select(host.sites, "cross"))


def block_of(model: Any) -> Any:
    return model.down_blocks[0].attentions[0].transformer_blocks[0]


def compiled_block(model: Any, backend: Any) -> None:
    torch._dynamo.reset()
    block_of(model).compile(backend=backend, fullgraph=True)


@pytest.mark.parametrize("op", [None, Gain(), Carries()])
def test_compiled_block_is_one_graph_for_all_steps(
    tiny_unet: nn.Module, run_unet: Run, gradients: Gradients, op: nn.Module | None
) -> None:
    model = tiny_unet.train()
    host = Host.attach(model)
    if op is not None:
        host.install(op, host.sites[:2])
    expected = run_unet(model)
    expected_gradients = gradients(model, expected)
    counter = CompileCounterWithBackend("aot_eager")
    compiled_block(model, counter)
    for step in range(4):
        with use(at(step)):
            output = run_unet(model)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    actual = gradients(model, output)
    for name, grad in expected_gradients.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3, rtol=1e-3)


def test_compiled_block_reports_its_sites_reached(tiny_unet: nn.Module, run_unet: Run) -> None:
    host = Host.attach(tiny_unet)
    compiled_block(tiny_unet, "eager")
    run_unet(tiny_unet)
    host.install(Gain(), host.sites[:2])
    compiled = run_unet(tiny_unet)
    assert not host.unproven
    block_of(tiny_unet)._compiled_call_impl = None
    torch.testing.assert_close(compiled, run_unet(tiny_unet), atol=1e-5, rtol=1e-5)
    host.remove(host.processors[host.sites[0].name].ops[0])
    assert not torch.allclose(compiled, run_unet(tiny_unet), atol=1e-4)


def test_compiled_block_sees_the_step_and_the_recompute_its_own(
    tiny_unet: nn.Module, run_unet: Run, gradients: Gradients
) -> None:
    class Scaled(Gain):
        def output(self, o: Tensor, call: SiteCall) -> Tensor:
            return o * self.weight * (1 + call.ctx.timestep.sum())

    model: Any = tiny_unet.train()
    hosted(model, Scaled())

    def step() -> dict[str, Tensor]:
        outputs = []
        for t in (1, 4):
            with use(StepContext(t, 10, torch.tensor([t, t]))):
                outputs.append(run_unet(model, seed=t))
        return gradients(model, torch.cat(outputs))

    expected = step()
    model.enable_gradient_checkpointing()
    compiled_block(model, "aot_eager")
    actual = step()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3, rtol=1e-3)


@pytest.mark.long
def test_inductor_block(tiny_unet: nn.Module, run_unet: Run, gradients: Gradients) -> None:
    model = tiny_unet.train()
    hosted(model, Gain())
    expected = run_unet(model)
    expected_gradients = gradients(model, expected)
    compiled_block(model, "inductor")
    output = run_unet(model)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    actual = gradients(model, output)
    for name, grad in expected_gradients.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-3, rtol=1e-3)
