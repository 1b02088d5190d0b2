"""The host: installing, refusing, copying, and reporting sites that were never reached."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.processor import HostedProcessor
from trainer.attention.sites import require, select

Run = Callable[..., Tensor]


class Gain(nn.Module):
    """A trainable op."""

    name = "gain"
    traits = Traits()

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5]))

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        return o * self.weight


class Kernel:
    traits = Traits()

    def __init__(self, name: str) -> None:
        self.name = name

    def kernel(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, call: SiteCall) -> Tensor:
        return q * v.mean(2, keepdim=True)


class Probs:
    name = "probs_reader"
    traits = Traits(scores=True)

    def probs(self, probs: Tensor, call: SiteCall) -> Tensor:
        return probs


class Scores:
    name = "scores_reader"
    traits = Traits(scores=True)

    def scores(self, scores: Tensor, call: SiteCall) -> Tensor:
        return scores


def processors(model: Any) -> list[Any]:
    return [site.module.processor for site in Host.attach(model).sites]


def test_attach_twice_is_one_host(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    before = processors(tiny_unet)
    assert Host.attach(tiny_unet) is host
    assert all(a is b for a, b in zip(processors(tiny_unet), before, strict=True))
    assert len(tiny_unet._forward_hooks) == len(tiny_unet._forward_pre_hooks) == 1


def test_attach_takes_in_sites_added_since(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    count = len(host.sites)
    model: Any = tiny_unet
    blocks = model.mid_block.attentions[0].transformer_blocks
    blocks.append(copy.deepcopy(blocks[0]))
    assert len(Host.attach(tiny_unet).sites) == count + 2
    added = require(host.sites, "mid & name:*transformer_blocks.1.*", "test")
    processor: Any = added[0].module.processor
    assert processor.site is added[0]
    assert processor.holder is host.holder


def test_copying_one_block_does_not_copy_the_denoiser(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    copied: dict[int, Any] = {}
    attn: Any = copy.deepcopy(host.sites[0].module, copied)
    assert attn.processor.site.module is attn
    assert id(host.sites[0].module) in copied
    assert not {id(tiny_unet), id(host), id(host.sites[1].module)} & copied.keys()


def test_detach_puts_back_what_was_there(tiny_unet: nn.Module, run_unet: Run) -> None:
    model: Any = tiny_unet
    before = model.attn_processors
    expected = run_unet(tiny_unet)
    keys = set(vars(tiny_unet))
    host = Host.attach(tiny_unet)
    model.enable_gradient_checkpointing()
    host.install(Gain(), select(host.sites, "cross"))
    assert not torch.equal(run_unet(tiny_unet.train()), expected)
    host.detach()
    assert all(model.attn_processors[name] is p for name, p in before.items())
    assert set(vars(tiny_unet)) == keys
    assert not tiny_unet._forward_hooks
    assert not tiny_unet._forward_pre_hooks
    assert not any("gain" in name for name, _ in tiny_unet.named_parameters())
    assert "BoundCheckpoint" not in repr(model.down_blocks[0]._gradient_checkpointing_func)
    assert torch.equal(run_unet(tiny_unet.eval()), expected)
    assert Host.attach(tiny_unet) is not host


def test_detach_leaves_a_processor_set_since(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    own = AttnProcessor2_0()
    module: Any = host.sites[0].module
    module.set_processor(own)
    host.detach()
    assert module.processor is own
    assert isinstance(host.sites[1].module.processor, AttnProcessor2_0)


def test_trainable_op_is_a_parameter_of_its_site(tiny_unet: nn.Module, run_unet: Run) -> None:
    keys = set(tiny_unet.state_dict())
    expected = run_unet(tiny_unet)
    host = Host.attach(tiny_unet)
    assert set(tiny_unet.state_dict()) == keys
    site = require(host.sites, "cross & mid", "test")[0]
    op = Gain()
    host.install(op, [site])
    assert set(tiny_unet.state_dict()) - keys == {f"{site.name}.gain.weight"}
    output = run_unet(tiny_unet)
    assert not torch.equal(output, expected)
    output.square().sum().backward()
    assert op.weight.grad is not None
    assert bool(op.weight.grad.any())
    host.remove(op)
    assert set(tiny_unet.state_dict()) == keys
    assert torch.equal(run_unet(tiny_unet), expected)


def test_deepcopy_has_ops_and_hooks_of_its_own(tiny_unet: nn.Module, run_unet: Run) -> None:
    expected = run_unet(tiny_unet)
    host = Host.attach(tiny_unet)
    site = require(host.sites, "cross & mid", "test")[0]
    op = Gain()
    host.install(op, [site])
    with_op = run_unet(tiny_unet)
    twin = copy.deepcopy(tiny_unet)
    own = Host.attach(twin)
    assert own is not host
    assert own.holder is not host.holder
    assert own.denoiser is twin
    assert torch.equal(run_unet(twin), with_op)

    twin_op: Any = own.processors[site.name].ops[0]
    assert twin_op is dict(twin.named_modules())[f"{site.name}.gain"]
    with torch.no_grad():
        twin_op.weight.fill_(3.0)
    assert torch.equal(run_unet(tiny_unet), with_op)
    assert not torch.equal(run_unet(twin), with_op)
    own.detach()
    assert torch.equal(run_unet(twin), expected)
    assert not twin._forward_hooks
    assert torch.equal(run_unet(tiny_unet), with_op)
    assert len(tiny_unet._forward_hooks) == 1


def test_hosted_denoiser_pickles(tiny_unet: nn.Module, run_unet: Run) -> None:
    host = Host.attach(tiny_unet)
    host.install(Gain(), select(host.sites, "cross & mid"))
    expected = run_unet(tiny_unet)
    twin = pickle.loads(pickle.dumps(tiny_unet))
    assert torch.equal(run_unet(twin), expected)
    assert Host.attach(twin).denoiser is twin


def test_sites_never_reached_are_reported(tiny_unet: nn.Module, run_unet: Run) -> None:
    host = Host.attach(tiny_unet)
    run_unet(tiny_unet)
    host.install(Probs(), select(host.sites, "cross"))
    lost: Any = require(host.sites, "cross & mid", "test")[0]
    lost.module.set_processor(AttnProcessor2_0())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="never reached") as caught:
            run_unet(tiny_unet)
        assert lost.name in str(caught.value)
        assert "down_blocks" not in str(caught.value)
        assert "UNet2DConditionModel" in str(caught.value)
    Host.attach(tiny_unet)
    run_unet(tiny_unet)


def test_site_whose_processor_is_taken_by_another_stays_on_the_list(
    tiny_unet: nn.Module, run_unet: Run
) -> None:
    class Foreign(AttnProcessor2_0):
        pass

    host = Host.attach(tiny_unet)
    host.install(Probs(), host.sites[:1])
    module: Any = host.sites[0].module
    module.set_processor(Foreign())
    Host.attach(tiny_unet)
    with pytest.raises(RuntimeError, match="never reached"):
        run_unet(tiny_unet)


def test_all_reached_is_no_error_and_is_checked_once(tiny_unet: nn.Module, run_unet: Run) -> None:
    host = Host.attach(tiny_unet)
    host.install(Probs(), host.sites)
    assert host.unproven
    run_unet(tiny_unet)
    assert not host.unproven


@pytest.mark.parametrize("reader", [Probs, Scores])
@pytest.mark.parametrize("kernel_first", [True, False])
def test_kernel_excludes_readers_of_scores(
    tiny_unet: nn.Module, reader: type, kernel_first: bool
) -> None:
    host = Host.attach(tiny_unet)
    pair = [Kernel("linear"), reader()]
    first, second = pair if kernel_first else pair[::-1]
    host.install(first, host.sites[:1])
    with pytest.raises(ValueError, match="asks for scores or probabilities") as caught:
        host.install(second, host.sites)
    message = str(caught.value)
    assert "'linear'" in message
    assert reader.name in message  # type: ignore[attr-defined]
    assert host.sites[0].name in message
    host.install(second, host.sites[1:])


def test_a_reader_of_scores_must_say_so(tiny_unet: nn.Module) -> None:
    class Silent(Probs):
        traits = Traits()

    class Boastful(Gain):
        traits = Traits(scores=True)

    host = Host.attach(tiny_unet)
    with pytest.raises(ValueError, match="'probs_reader' has a stage for scores or probabilities"):
        host.install(Silent(), host.sites)
    with pytest.raises(ValueError, match=r"'gain' has no stage for scores .* scores=True; make"):
        host.install(Boastful(), host.sites)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (Traits(owner="mine", masks=False), "op 'masked' has a mask for .*methods.mine takes no"),
        (Traits(more_keys=False), "op 'masked' gives .* further keys, .*'linear' needs one for ea"),
    ],
)
def test_a_kernel_refuses_what_its_traits_exclude(
    tiny_unet: nn.Module, declared: Traits, message: str
) -> None:
    class Masked:
        name = "masked"
        traits = Traits(appends=True)

        def mask(self, mask: Any, q: Tensor, k: Tensor, call: SiteCall) -> Any:
            return mask

    host = Host.attach(tiny_unet)
    kernel = Kernel("linear")
    kernel.traits = declared
    host.install(kernel, host.sites)
    with pytest.raises(ValueError, match=message):
        host.install(Masked(), host.sites)
    host.remove(kernel)
    kernel.traits = Traits()
    host.install(kernel, host.sites)
    host.install(Masked(), host.sites)


def test_an_op_that_needs_gradients_is_seen_by_the_host(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    gain = Gain()
    host.install(gain, host.sites[:1])
    assert not host.needs_grad
    guide = Gain()
    guide.name, guide.traits = "guide", Traits(grad=True)
    host.install(guide, host.sites[1:])
    assert host.needs_grad
    host.remove(guide)
    assert not host.needs_grad


def test_refused_install_changes_nothing(tiny_unet: nn.Module, run_unet: Run) -> None:
    host = Host.attach(tiny_unet)
    host.install(Kernel("linear"), host.sites[-1:])
    expected = run_unet(tiny_unet)
    with pytest.raises(ValueError, match="op 'linear' and op 'agent' both replace") as caught:
        host.install(Kernel("agent"), host.sites)
    assert host.sites[-1].name in str(caught.value)
    assert torch.equal(run_unet(tiny_unet), expected)
    assert [len(p.ops) for p in host.processors.values()] == [0] * (len(host.sites) - 1) + [1]


class AfterBlock:
    """Doubles what a block puts out."""

    name = "after_block"
    traits = Traits()

    def block(self, x: Tensor, call: SiteCall) -> Tensor:
        self.seen = (x.shape, call.site.name, call.ctx.latent_size)
        return 2 * x


def test_a_block_stage_runs_after_the_block_around_its_site(
    tiny_unet: nn.Module, run_unet: Run
) -> None:
    expected = run_unet(tiny_unet)
    host = Host.attach(tiny_unet)
    (site,) = require(host.sites, "self & mid", "test")
    block = tiny_unet.get_submodule(site.name.rpartition(".")[0])
    given: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: given.append(output))
    op = AfterBlock()
    host.install(op, [site])
    after: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: after.append(output))
    doubled = run_unet(tiny_unet)
    assert not torch.allclose(doubled, expected, atol=1e-3)
    assert op.seen == ((2, 16, 32), site.name, (8, 8))
    assert torch.equal(after[0], 2 * given[0])
    assert torch.equal(run_unet(copy.deepcopy(tiny_unet)), doubled)
    twin: Any = copy.deepcopy(tiny_unet)
    Host.attach(twin).detach()
    assert torch.equal(run_unet(twin), expected)
    Host.attach(tiny_unet)
    assert torch.equal(run_unet(tiny_unet), doubled)
    host.remove(op)
    assert torch.equal(run_unet(tiny_unet), expected)


def test_a_block_stage_needs_a_block(tiny_unet: nn.Module) -> None:
    bare = nn.ModuleDict({"attn": Attention(8, heads=2, dim_head=4)})
    for model in (bare, nn.ModuleDict({"blocks": nn.ModuleList([bare["attn"]])})):
        host = Host.attach(model)
        with pytest.raises(ValueError, match=r"'after_block' acts after the block.*is inside none"):
            host.install(AfterBlock(), host.sites)
        assert not any(processor.ops for processor in host.processors.values())
        host.detach()

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = bare["attn"]

        def forward(self, x: Tensor) -> Any:
            return self.attn(x), x

    model = nn.ModuleDict({"pair": Pair()})
    host = Host.attach(model)
    host.install(AfterBlock(), host.sites)
    with pytest.raises(ValueError, match=r"Pair around 'pair\.attn' does not return tokens"):
        model["pair"](torch.randn(1, 4, 8))


def test_mistaken_installs_are_refused(tiny_unet: nn.Module) -> None:
    host = Host.attach(tiny_unet)
    op = Probs()
    with pytest.raises(ValueError, match="'probs_reader' was given no site"):
        host.install(op, [])
    with pytest.raises(ValueError, match="is installed on no site"):
        host.remove(op)
    host.install(op, host.sites[:1])
    with pytest.raises(ValueError, match="already on"):
        host.install(op, host.sites)

    class Nothing:
        name = "nothing"
        traits = Traits()

    with pytest.raises(
        ValueError, match="'nothing' has no stage to run at; give it one of skip, tok"
    ):
        host.install(Nothing(), host.sites)

    class Clash(Gain):
        name = "to_q"

    with pytest.raises(ValueError, match="'to_q' cannot be registered"):
        host.install(Clash(), host.sites)
    with pytest.raises(ValueError, match="is no site of this denoiser"):
        Host.attach(copy.deepcopy(tiny_unet)).install(Probs(), host.sites[1:])


def test_submodule_named_like_a_stage_is_no_stage(tiny_unet: nn.Module, run_unet: Run) -> None:
    class WithMask(Gain):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Linear(1, 1)

    host = Host.attach(tiny_unet)
    host.install(WithMask(), select(host.sites, "mid & cross"))
    run_unet(tiny_unet)


def test_site_with_a_processor_of_its_own_is_left_alone_and_refused(
    tiny_unet: nn.Module, run_unet: Run
) -> None:
    class Linear:
        def __call__(self, attn: Attention, hidden_states: Tensor, **_: Any) -> Tensor:
            out: Tensor = attn.to_out[0](attn.to_v(hidden_states))
            return out

    model: Any = tiny_unet
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Linear())
    host = Host.attach(tiny_unet)
    kept = require(host.sites, "self & mid", "test")
    assert isinstance(kept[0].module.processor, Linear)
    with pytest.raises(ValueError, match="runs Linear, which is not hosted: it makes no"):
        host.install(Probs(), kept)
    host.install(Probs(), select(host.sites, "cross"))
    run_unet(tiny_unet)
    assert isinstance(host.sites[0].module.processor, HostedProcessor)
