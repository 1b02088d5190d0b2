"""NF4: what is packed and how exactly, what it takes, that adapters train over it and nothing of it
moves; 8-bit optimisers."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.backbones import four_bits
from trainer.backbones.device import Placement, place
from trainer.config.load import load_recipe, methods_of
from trainer.config.optimisers import UNPAGED
from trainer.methods.apply import apply_methods
from trainer.methods.weight.nf4 import Nf4
from trainer.ops.adapters import nf4
from trainer.ops.adapters.inject import fold
from trainer.training.memory_estimate import memory_of
from trainer.training.optim import Optim, optimizer_class
from trainer.training.plan_report import describe_plan
from trainer.training.step_memory import step_bytes

# QLoRA, appendix E
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
QLORA: dict[str, Any] = {"nf4": {"min_size": 1024}, "lora": {"rank": 2}}


def packed(backbone: Any) -> dict[str, Any]:
    return {name: layer for name, layer in backbone.named_modules() if four_bits.is_packed(layer)}


def storage(backbone: Any) -> dict[str, list[Tensor]]:
    """The packed bytes and all that they are scaled with."""
    found = {}
    for name, layer in packed(backbone).items():
        state = layer.weight.quant_state
        parts = (layer.weight.data, *four_bits.scales(layer.weight), state.code, state.state2.code)
        found[name] = [part.clone() for part in parts]
    return found


def same(one: dict[str, list[Tensor]], other: dict[str, list[Tensor]]) -> bool:
    pairs = [(a, b) for name in one for a, b in zip(one[name], other[name], strict=True)]
    return one.keys() == other.keys() and all(torch.equal(a, b) for a, b in pairs)


def linear(out: int, width: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out + width)
    return nn.Linear(width, out, bias=bias)


@pytest.mark.parametrize("shape", [(8, 24), (64, 64), (33, 100), (320, 128)], ids=str)
def test_each_value_is_the_nearest_of_sixteen_times_its_scale(shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    blocks = torch.zeros(-(-layer.weight.numel() // 64), 64)
    blocks.view(-1)[: layer.weight.numel()] = layer.weight.detach().flatten()
    largest = blocks.abs().amax(1, keepdim=True)
    codes = torch.tensor(CODES)
    nearest = codes[(blocks / largest - codes.view(-1, 1, 1)).abs().argmin(0)]
    naive = (nearest * largest).flatten()[: layer.weight.numel()].view(shape)
    plain: Any = four_bits.unpacked(four_bits.pack(layer, torch.float32))
    # the scales themselves are rounded to 8 bits, to a share of their spread in a group of 256
    spread = float((largest - largest.mean()).abs().max())
    torch.testing.assert_close(plain.weight, naive, rtol=0, atol=0.03 * spread + 1e-6)
    assert torch.equal(plain.bias, layer.bias)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_it_computes_with_those_values_and_passes_gradients_on(bias: bool) -> None:
    layer = four_bits.pack(linear(48, 40, bias), torch.float32)
    plain = four_bits.unpacked(layer)
    x = torch.randn(3, 7, 40, generator=torch.Generator().manual_seed(1)).requires_grad_()
    own, wanted = layer(x), plain(x)
    torch.testing.assert_close(own, wanted)
    (found,) = torch.autograd.grad(own.square().sum(), x)
    (reference,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(found, reference)


def test_bf16_computes_in_bf16_and_answers_in_the_dtype_it_was_asked_in() -> None:
    layer: Any = four_bits.pack(linear(48, 40), torch.bfloat16)
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    bias = layer.bias.detach().clone()
    found = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, four_bits.unpacked(layer)(x), rtol=0.02, atol=0.02)
    assert torch.equal(layer.bias, bias)


def test_packs_the_large_linear_layers_but_time_norms_and_output(tiny: Any) -> None:
    before = dict(tiny.named_modules())
    apply_methods(tiny, methods_of(QLORA))
    wanted = {
        name
        for name, layer in before.items()
        if name.startswith("unet.")
        and type(layer) is nn.Linear
        and layer.weight.numel() >= 1024
        and layer.in_features % 64 == 0
        and "time_emb" not in name
    }
    assert wanted
    assert {name.replace(".base_layer", "") for name in packed(tiny)} == wanted


def test_skip_and_min_size(tiny: Any) -> None:
    chosen = Nf4(min_size=2048, skip=("*attn1*", "time_embedding.*")).chosen(tiny.unet)
    assert chosen
    for name, layer in chosen.items():
        assert "attn1" not in name
        assert not name.startswith("time_embedding")
        assert layer.weight.numel() >= 2048
    assert any(name.endswith("time_emb_proj") for name in chosen)


def test_bits_a_value_at_the_sizes_of_the_shipped_network(open_folder: Any) -> None:
    """QLoRA says 4.127."""
    shipped = open_folder(Path(__file__).parents[2] / "data" / "tiny")
    apply_methods(shipped, methods_of({"nf4": {}, "lora": {"rank": 2}}))
    assert 4.12 < nf4.bits_per_value(shipped) <= 4.13
    states = [layer.weight.quant_state for layer in packed(shipped).values()]
    assert len({state.code.data_ptr() for state in states}) == 1
    assert len({state.state2.code.data_ptr() for state in states}) == 1


def test_bits_need_a_packed_layer(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"apply methods\.nf4 first"):
        nf4.bits_per_value(tiny)


@pytest.mark.parametrize("beside", ["lora", "dora"])
def test_adapters_train_over_it_and_no_bit_of_it_moves(
    beside: str, tiny: Any, train: Callable[..., list[float]], predict: Callable[[Any], Tensor]
) -> None:
    plan = apply_methods(tiny, methods_of({"nf4": {"min_size": 1024}, beside: {"rank": 2}}))
    before = storage(tiny)
    train(tiny, plan)
    predict(tiny.eval())  # where bitsandbytes could repack for inference
    assert same(storage(tiny), before)
    parameters = dict(tiny.named_parameters())
    for name in plan.names:
        grad = parameters[name].grad
        assert grad is not None
        assert torch.isfinite(grad).all()
        assert grad.any(), name
    assert all(layer.weight.grad is None for layer in packed(tiny).values())


@pytest.mark.parametrize("beside", ["lora", "dora"])
def test_over_layers_that_compute_in_bf16_fp32_matrices_train(
    beside: str, tiny: Any, train: Callable[..., list[float]]
) -> None:
    """A step of 1e-6 of a value is lost in bf16, which has 8 bits."""
    tree = {"nf4": {"min_size": 1024, "compute": "bf16"}, beside: {"rank": 2}}
    plan = apply_methods(tiny, methods_of(tree))
    place(tiny, Placement(torch.device("cpu"), "bf16"), plan.stored)
    parameters = dict(tiny.named_parameters())
    trained = {name: parameters[name] for name in plan.names}
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert plan.trained_bytes == 4 * plan.trained
    before = {name: value.detach().clone() for name, value in trained.items()}
    with torch.autocast("cpu", torch.bfloat16):
        train(tiny, plan, steps=1)
    moved = [name for name, value in trained.items() if not torch.equal(value, before[name])]
    assert len(moved) == len(trained)
    assert any(
        not torch.equal(value, value.bfloat16().float()) for value in trained.values()
    )  # more than bf16 could hold


def test_gradients_of_lora_are_those_over_the_same_values_unpacked(
    tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    plan = apply_methods(tiny, methods_of(QLORA))
    plain = copy.deepcopy(tiny)
    for name, layer in packed(plain).items():
        owner, _, last = name.rpartition(".")
        setattr(plain.get_submodule(owner), last, four_bits.unpacked(layer))
    grads = []
    for model in (tiny, plain):
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(0)
        for name in plan.names:
            noise = torch.randn(parameters[name].shape, generator=generator)
            parameters[name].data.add_(0.1 * noise)
        output = predict(model)
        output.square().sum().backward()
        grads.append([output.detach(), *(parameters[name].grad for name in plan.names)])
    for found, reference in zip(*grads, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-3, atol=1e-4)


def test_copies_and_reloads_are_bit_identical(
    tiny: Any,
    tiny_folder: Path,
    open_folder: Callable[[Path], Any],
    predict: Callable[[Any], Tensor],
) -> None:
    apply_methods(tiny, methods_of(QLORA))
    with torch.no_grad():
        own, copied = predict(tiny), predict(copy.deepcopy(tiny))
    assert torch.equal(own, copied)
    again = open_folder(tiny_folder)
    apply_methods(again, methods_of(QLORA))
    assert same(storage(again), storage(tiny))
    one = next(iter(packed(copy.deepcopy(tiny)).values()))
    assert one.weight.module is None


@pytest.mark.parametrize("beside", ["lora", "dora"])
def test_folded_it_is_plain_and_does_the_same(
    beside: str,
    tiny: Any,
    train: Callable[..., list[float]],
    tmp_path: Path,
    predict: Callable[[Any], Tensor],
) -> None:
    from diffusers import UNet2DConditionModel

    plan = apply_methods(tiny, methods_of({"nf4": {"min_size": 1024}, beside: {"sites": "cross"}}))
    train(tiny, plan)
    tiny.eval()
    live = predict(tiny).detach()
    fold(tiny)
    assert not packed(tiny)
    assert not any("Linear4bit" in type(layer).__name__ for layer in tiny.modules())
    torch.testing.assert_close(predict(tiny), live, rtol=1e-4, atol=1e-5)
    tiny.host.detach()
    tiny.unet.save_pretrained(tmp_path)
    tiny.unet = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(predict(tiny), live, rtol=1e-4, atol=1e-5)


def test_the_report_counts_values_not_bytes(tiny: Any, tiny_folder: Path) -> None:
    total = sum(value.numel() for value in tiny.parameters())
    words = ["recipe=custom_diffusion", f"backbone={tiny_folder}", "run.batch_size=2"]
    words += ["methods.selective=null", "methods.new_token=null", "methods.nf4.min_size=1024"]
    recipe = load_recipe([*words, "methods.lora.rank=2", "data.prior_weight=0"])
    full = step_bytes(recipe, tiny, 2)
    plan = apply_methods(tiny, recipe.methods)
    facts = describe_plan(recipe, tiny, plan, memory_of(recipe, tiny, plan).peak)
    assert facts["total"] == total + plan.trained
    assert facts["peak_memory_bytes"] < 4 * total + full


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"nf4": {}}, "nothing would train with methods nf4"),
        ({"nf4": {"skip": ["*ff.net.9"]}}, "skip: '*ff.net.9' matches no linear layer"),
        ({"nf4": {"min_size": 10**9}}, "lower min_size, or skip less"),
        ({**QLORA, "lora": {"init": "pissa"}}, "init=pissa starts from W0 itself, and methods.nf4"),
        ({**QLORA, "lora": {"init": "olora"}}, "init=olora starts from W0 itself, and methods.nf4"),
        ({"nf4": {}, "selective": {"sites": "all"}}, "methods.nf4 and methods.selective both"),
        ({"nf4": {}, "full": {}}, "methods.nf4 and methods.full both claim weight of unet."),
    ],
)
def test_refused_with_the_mend(tree: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, methods_of(tree))
    assert message in str(error.value)


def test_without_bitsandbytes_it_says_how_to_get_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'attention-trainer\[qlora\]'"):
        apply_methods(tiny, methods_of(QLORA))
    assert not packed(tiny)
    with pytest.raises(ValueError, match=r"optim\.name=adamw8bit needs bitsandbytes; pip install"):
        optimizer_class("adamw8bit", "cpu")


@pytest.mark.parametrize(("name", "instead"), UNPAGED.items())
def test_a_paged_optimiser_on_a_cpu_is_refused(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"this run is on cpu; set optim\.name={instead}$"):
        optimizer_class(name, "cpu")
    assert optimizer_class(instead, "cpu") is not None


@pytest.mark.parametrize(("name", "bits"), [("paged_adamw8bit", 8), ("paged_adamw32bit", 32)])
def test_a_paged_optimiser_is_bitsandbytes_own(name: str, bits: int) -> None:
    """Making one needs no GPU; the first step does."""
    optimizer = optimizer_class(name, "cuda")([nn.Parameter(torch.ones(80, 100))], lr=1e-2)
    assert optimizer.is_paged
    assert optimizer.args.optim_bits == bits


@pytest.mark.gpu
def test_paged_steps_are_those_of_adamw() -> None:
    """Moments of 32 bits in pages change nothing but where they lie."""
    finals = []
    for name in ("adamw", "paged_adamw32bit"):
        weight = nn.Parameter(torch.ones(80, 100, device="cuda"))
        make = optimizer_class(name, "cuda")
        optimizer = make([weight], lr=1e-2, weight_decay=0.1)
        for seed in range(10):
            generator = torch.Generator().manual_seed(seed)
            weight.grad = torch.randn(weight.shape, generator=generator).cuda()
            optimizer.step()
        finals.append(weight.detach().cpu())
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-5, atol=1e-6)


def test_the_default_optimiser_is_pytorchs() -> None:
    assert optimizer_class(Optim(1e-3, 1).name, "cpu") is torch.optim.AdamW


def step(weight: nn.Parameter, optimizer: torch.optim.Optimizer, seed: int) -> None:
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


def test_8_bit_moments_survive_a_checkpoint_bit_for_bit() -> None:
    """Its file as a checkpoint is written and read: by torch, weights only."""
    make = optimizer_class("adamw8bit", "cpu")
    one = nn.Parameter(torch.ones(80, 100))
    optimizer = make([one], lr=1e-2, weight_decay=0.1)
    for seed in range(3):
        step(one, optimizer, seed)
    state = optimizer.state[one]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    file = io.BytesIO()
    torch.save((one.detach(), optimizer.state_dict()), file)
    file.seek(0)
    value, stored = torch.load(file, weights_only=True)
    other = nn.Parameter(value)
    resumed = make([other], lr=1.0)
    resumed.load_state_dict(stored)
    for seed in range(3, 6):
        step(one, optimizer, seed)
        step(other, resumed, seed)
    assert torch.equal(one, other)


def test_8_bit_steps_are_near_those_of_32_bits() -> None:
    finals = []
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(torch.ones(80, 100))
        optimizer = optimizer_class(name, "cpu")([weight], lr=1e-2, weight_decay=0.1)
        for seed in range(10):
            step(weight, optimizer, seed)
        finals.append(weight.detach() - 1)
    assert float((finals[0] - finals[1]).norm() / finals[0].norm()) < 0.05


@pytest.mark.slow
def test_a_resumed_qlora_run_is_the_same_run(tmp_path: Path, tiny_folder: Path) -> None:
    """Stopped after two of four steps, then continued: weights, 8-bit moments, packed base."""
    words = [
        "recipe=qlora", f"backbone={tiny_folder}", "optim.name=adamw8bit",
        "methods.new_token.init=animal",
        "methods.nf4.min_size=1024", "methods.lora.rank=2", "data.prior_images=4",
        "data.prior_prompts=[a fox, a cat left of a tree]", "data.prior_steps=2",
        "data.class_word=null",
        "data.augment=false", "run.batch_size=2", "run.validate_every=0", "run.checkpoint_every=2",
        "preview.every=0", "tracker=none",
    ]  # fmt: skip

    def fit(*own: str) -> None:
        ran = command("fit", *words, *own, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr[-3000:]

    runs = tmp_path / "runs" / "qlora"
    fit("run.id=whole", "run.steps=4")
    fit("run.id=half", "run.steps=2")
    (runs / "half" / "adapter.safetensors").unlink()
    fit(f"run={runs / 'half'}", "run.steps=4")
    one, other = (load_file(runs / run / "adapter.safetensors") for run in ("whole", "half"))
    assert sorted(one) == json.loads((runs / "whole" / "plan.json").read_text())["trains"]
    assert all(torch.equal(one[name], other[name]) for name in one)
