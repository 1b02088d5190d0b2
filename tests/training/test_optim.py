"""Muon beside AdamW in one optimiser. AdamW and its 8-bit forms: `test_module`, `test_nf4`."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.diffusion.objective import Objective
from trainer.methods.apply import apply_methods
from trainer.training.module import DiffusionModule
from trainer.training.optim import Muon, Optim, make_optimizer
from trainer.training.tasks.denoise import Denoise

OPTIM = Optim(1e-3, 10, name="muon", muon_lr=4e-3, weight_decay=0.1)
BLOCKS = ("net.blocks.0.",)


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    shapes = {
        "net.blocks.0.to_q.weight": (8, 4), "net.blocks.0.to_q.bias": (8,),
        "net.blocks.0.conv.weight": (4, 4, 3, 3), "net.head.weight": (4, 8),
        "net.blocks.0.own.weight": (4, 4),
    }  # fmt: skip
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def made(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    return make_optimizer(
        OPTIM, named, lrs={"net.blocks.0.own.weight": 0.5}, blocks=BLOCKS, device="cpu"
    )


def step(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in named.values():
        value.grad = torch.randn(value.shape, generator=generator)
    optimizer.step()


def test_matrices_in_blocks_step_as_pytorchs_muon_and_the_rest_as_its_adamw() -> None:
    named, alone = parameters(), parameters()
    optimizer = made(named)
    matrix = alone["net.blocks.0.to_q.weight"]
    muon = torch.optim.Muon([matrix], 4e-3, 0.1, adjust_lr_fn="match_rms_adamw")
    own = alone["net.blocks.0.own.weight"]
    rest = [value for value in alone.values() if value is not matrix and value is not own]
    adamw = torch.optim.AdamW(
        [{"params": rest}, {"params": [own], "lr": 0.5}], lr=1e-3, weight_decay=0.1
    )
    for seed in range(3):
        step(named, optimizer, seed)
        step(alone, muon, seed)
        adamw.step()
    assert all(torch.equal(named[name], alone[name]) for name in named)


def test_an_orthogonal_step_is_of_the_size_of_adamws() -> None:
    """Root mean square 0.2 lr whatever the shape, within what five Newton-Schulz steps leave."""
    for shape in ((64, 64), (64, 256), (256, 64)):
        value = nn.Parameter(torch.zeros(shape))
        optimizer = make_optimizer(
            OPTIM, {"net.blocks.0.x": value}, lrs={}, blocks=BLOCKS, device="cpu"
        )
        step({"x": value}, optimizer, 0)
        assert float(value.detach().square().mean().sqrt()) == pytest.approx(0.2 * 4e-3, rel=0.2)


def test_it_resumes_from_a_checkpoint_bit_for_bit() -> None:
    named, again = parameters(), parameters()
    optimizer = made(named)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, OPTIM.factor)
    for seed in range(3):
        step(named, optimizer, seed)
        schedule.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    for name, value in again.items():
        value.data.copy_(named[name].data)
    resumed = made(again)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for group in (*optimizer.param_groups, *resumed.param_groups):
        group["lr"] *= 0.5  # as a schedule does
    for seed in range(3, 6):
        step(named, optimizer, seed)
        step(again, resumed, seed)
    assert all(torch.equal(named[name], again[name]) for name in named)


def test_the_loss_of_the_closure_comes_back() -> None:
    optimizer = made(parameters())
    assert optimizer.step(lambda: 3.0) == 3.0


def module_of(backbone: Any, tree: dict[str, Any], optim: Optim) -> DiffusionModule:
    plan = apply_methods(backbone, methods_of(tree))
    task = Denoise(backbone, Objective(backbone.target, backbone.alphas_cumprod))
    return DiffusionModule(backbone, task, optim, trained=plan.names)


def moved_by_muon(optimizer: Any) -> list[Tensor]:
    return [value for group in optimizer.parts[0].param_groups for value in group["params"]]


@pytest.mark.parametrize("kind", ["tiny", "dit"])
def test_in_a_backbone_it_moves_the_matrices_beside_attention(
    kind: str, request: pytest.FixtureRequest
) -> None:
    backbone = request.getfixturevalue(kind)
    optimizer = module_of(backbone, {"full": {}}, OPTIM).configure_optimizers()["optimizer"]
    assert isinstance(optimizer, Muon)
    moved = {id(value) for value in moved_by_muon(optimizer)}
    names = {name for name, value in backbone.named_parameters() if id(value) in moved}
    inside = [name for name in names if ".transformer_blocks." in name]
    assert sorted(names) == sorted(inside)
    assert any(name.endswith("attn1.to_q.weight") for name in names)
    assert any(".ff." in name for name in names)
    every = [value for group in optimizer.param_groups for value in group["params"]]
    assert (
        len(every)
        == len({id(value) for value in every})
        == len(list(backbone.denoiser.parameters()))
    )


def test_nothing_to_move_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no such matrix is trained; set optim\.name=adamw"):
        make_optimizer(
            OPTIM,
            {"net.head.weight": nn.Parameter(torch.zeros(2, 2))},
            lrs={},
            blocks=BLOCKS,
            device="cpu",
        )


def test_its_lr_is_refused_for_another_optimiser() -> None:
    with pytest.raises(RecipeError, match=r"muon_lr=0\.01 is for name=muon, and name is adamw"):
        load_recipe(["recipe=tiny_dit", "optim.name=adamw", "optim.muon_lr=0.01"])


def test_adamw_is_fused_on_cuda_unless_the_loss_is_scaled() -> None:
    """A fused step that undid the scale itself would come after the gradients are clipped."""
    adamw = Optim(1e-3, 10)

    def one(name: str, device: str, **more: bool) -> Any:
        chosen = replace(adamw, name=name)
        return make_optimizer(chosen, parameters(), lrs={}, blocks=BLOCKS, device=device, **more)

    assert one("adamw", "cuda").defaults["fused"]
    assert not one("adamw", "cuda", scaled=True).defaults["fused"]
    assert not one("adamw", "cpu").defaults["fused"]
    (_, beside_muon) = one("muon", "cuda").parts
    assert beside_muon.defaults["fused"]
