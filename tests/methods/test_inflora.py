"""InfLoRA: the new task reads nothing of the old ones' inputs; the memory against a plain loop over
directions; several tasks one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import Plan, apply_methods
from trainer.methods.weight.inflora import Inflora
from trainer.ops.adapters.subspace import claim, design, pack_subspace, unpack
from trainer.runs.adapter import save_adapter, start_from

SIZES = [(7, 3), (16, 4), (33, 5)]
each_size = pytest.mark.parametrize(("width", "rank"), SIZES, ids=[str(w) for w, _ in SIZES])


def inputs(width: int, rank: int, seed: int, count: int = 50) -> Tensor:
    """Tokens (count, width) that lie in a random subspace of `rank` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    return drawn @ torch.randn(rank, width, generator=generator, dtype=torch.float64)


def moment(tokens: Tensor) -> Tensor:
    return tokens.T @ tokens


def whole(width: int) -> Tensor:
    return unpack(torch.zeros(width, width // 2), False)


def dual_gpm(tasks: list[Tensor], energy: float) -> Tensor:
    """The old tasks' subspace as the paper builds it: singular vectors of what the basis so far
    does not hold, one at a time, until it holds enough."""
    basis = torch.zeros(tasks[0].shape[1], 0, dtype=torch.float64)
    for tokens in tasks:
        features = tokens.T  # d n
        rest = features - basis @ basis.T @ features
        vectors, values, _ = torch.linalg.svd(rest, full_matrices=False)
        held = 1 - float(rest.square().sum() / features.square().sum())
        taken = 0
        while held < energy - 1e-12 and taken < len(values):
            held += float(values[taken] ** 2 / features.square().sum())
            taken += 1
        basis = torch.cat([basis, vectors[:, :taken]], dim=1)
    return basis


@each_size
@pytest.mark.parametrize("energy", [0.6, 0.95, 1.0])
def test_memory_against_singular_vectors_one_by_one(width: int, rank: int, energy: float) -> None:
    tasks = [inputs(width, width, seed) * torch.arange(1, width + 1) for seed in range(3)]
    free = whole(width)
    for number, tokens in enumerate(tasks):
        free = claim(free, moment(tokens), energy)
        kept, complement = pack_subspace(free)
        assert kept.shape == (width, width // 2)
        free = unpack(kept.float(), complement)
        basis = dual_gpm(tasks[: number + 1], energy)
        assert free.shape == (width, width - basis.shape[1])
        torch.testing.assert_close(
            free @ free.T, torch.eye(width).double() - basis @ basis.T, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(free.T @ free, torch.eye(free.shape[1]).double())


@each_size
def test_both_forms_say_the_same(width: int, rank: int) -> None:
    for taken in range(width + 1):
        free = torch.linalg.qr(inputs(width, width, taken, width))[0][:, taken:]
        kept, complement = pack_subspace(free)
        assert complement == (width - taken <= width // 2)
        again = unpack(kept, complement)
        torch.testing.assert_close(again @ again.T, free @ free.T)


@each_size
def test_old_inputs_give_nothing_new_ones_all_they_can(width: int, rank: int) -> None:
    old, new = inputs(width, width // 3, 0), inputs(width, width // 2, 1)
    free = claim(whole(width), moment(old), 1.0)
    rows = design(free, moment(new), rank).float()
    assert rows.shape == (rank, width)
    assert float((old.float() @ rows.T).norm() / old.norm()) < 1e-6
    rest = new @ free @ free.T
    count = min(rank, width // 2)
    torch.testing.assert_close(rows[:count] @ rows[:count].T, torch.eye(count))
    best = torch.linalg.svdvals(rest)[:count].square().sum()
    torch.testing.assert_close((new @ rows[:count].double().T).square().sum(), best)


def test_rows_beyond_what_is_free_are_zero() -> None:
    free = claim(whole(9), moment(inputs(9, 7, 0)), 1.0)
    rows = design(free, moment(inputs(9, 9, 1)), 5)
    torch.testing.assert_close(rows @ rows.T, torch.diag(torch.tensor([1.0, 1, 0, 0, 0])).double())
    assert free.shape == (9, 2)


def learn(
    backbone: Any, task: int, before: Path | None, path: Path, look: Callable[[], None], **more: Any
) -> Plan:
    """Task `task` as a run does it: apply, go on, prepare, train (here: B by chance), finish,
    save."""
    options = {"rank": 3, "task": task, "num_tasks": 3, "sites": "cross & mid", **more}
    tree = {"inflora": options}
    plan = apply_methods(backbone, methods_of(tree))
    if before is not None:
        start_from(before, backbone, plan)
    edit = plan.edits["inflora"]
    assert edit.prepare is not None and edit.finish is not None
    edit.prepare(look)
    parameters = dict(backbone.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            assert parameters[name].abs().max() == 0
            parameters[name].normal_(generator=torch.Generator().manual_seed(task))
    edit.finish(look)
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    stored = {name: tensors[name].clone() for name in plan.stored}
    save_adapter(path, stored, {"backbone": "x", "methods": tree}, backbone.identity())
    return plan


def looker(backbone: Any, tokens: Tensor) -> Callable[[], None]:
    """Runs the cross-attention projections of the middle on tokens (n, 128)."""
    sites = [site for site in backbone.sites if site.kind == "cross" and site.place == "mid"]

    @torch.no_grad()
    def look() -> None:
        for site in sites:
            site.projection("k")(tokens.float())
            site.projection("v")(tokens.float())

    return look


def layers(backbone: Any) -> list[Any]:
    sites = [site for site in backbone.sites if site.kind == "cross" and site.place == "mid"]
    return [site.projection(role) for site in sites for role in ("k", "v")]


def test_three_tasks_leave_the_first_two_as_they_were(
    tiny_folder: Path, open_folder: Callable[[Path], Any], tmp_path: Path
) -> None:
    tasks = [inputs(128, 20, seed) for seed in range(3)]
    paths = [tmp_path / f"{task}.safetensors" for task in range(3)]
    outputs: list[list[Tensor]] = []
    stored: dict[str, Tensor] = {}
    for task, tokens in enumerate(tasks):
        backbone = open_folder(tiny_folder)
        plan = learn(
            backbone, task, paths[task - 1] if task else None, paths[task],
            looker(backbone, tokens), energy=(1.0, 1.0),
        )  # fmt: skip
        assert all(f".lora_B.inflora-{task}.weight" in name for name in plan.names)
        assert all(f"-{task + 1}." not in name for name in plan.keeps)
        own = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        for name, value in stored.items():
            if "inflora_" not in name:
                assert torch.equal(own[name], value), name
        stored = {name: own[name].clone() for name in plan.stored}
        with torch.no_grad():
            results = [layer(tasks[0].float()) for layer in layers(backbone)]
        outputs.append(results)
        new = layers(backbone)[0].lora_A[f"inflora-{task}"].weight
        for old in tasks[:task]:
            assert float((old.float() @ new.T).norm() / old.norm()) < 1e-6
        assert float((tokens.float() @ new.T).norm() / tokens.norm()) > 0.1
    for later in outputs[1:]:
        for first, now in zip(outputs[0], later, strict=True):
            torch.testing.assert_close(now, first, rtol=1e-5, atol=1e-4)
    kept, complement = stored_memory(stored)
    assert unpack(kept, complement).shape == (128, 128 - 60)


def stored_memory(stored: dict[str, Tensor]) -> tuple[Tensor, bool]:
    (name,) = (name for name in stored if name.endswith("to_k.inflora_kept"))
    return stored[name], bool(stored[name.replace("_kept", "_complement")])


def test_energy_rises_with_the_tasks(tiny_folder: Path, open_folder: Any, tmp_path: Path) -> None:
    tokens = inputs(128, 128, 0) * torch.arange(1, 129)
    before: Path | None = None
    for task, share in enumerate((0.7, 0.8)):  # 0.7 + 0.3 * task / 3
        backbone = open_folder(tiny_folder)
        path = tmp_path / f"{task}.safetensors"
        learn(backbone, task, before, path, looker(backbone, tokens), energy=(0.7, 1.0))
        before, layer = path, layers(backbone)[0]
        free = unpack(layer.inflora_kept, bool(layer.inflora_complement))
        held = 1 - float((tokens @ free).square().sum() / tokens.square().sum())
        assert share <= held < share + 0.03


def test_forward_and_gradient_against_a_plain_sum(tiny: Any) -> None:
    options = {"rank": 3, "alpha": 6, "task": 1, "num_tasks": 2}
    plan = apply_methods(tiny, methods_of({"inflora": options}))
    layer = layers(tiny)[0]
    generator = torch.Generator().manual_seed(0)
    downs = [layer.lora_A[f"inflora-{task}"].weight for task in range(2)]
    ups = [layer.lora_B[f"inflora-{task}"].weight for task in range(2)]
    with torch.no_grad():
        for up in ups:
            up.normal_(generator=generator)
    assert not any(weight.requires_grad for weight in (*downs, ups[0]))
    x = torch.randn(5, 9, 128, generator=generator)
    layer(x).square().sum().backward()
    own = ups[1].detach().clone().requires_grad_()
    weight = layer.base_layer.weight + 2 * (ups[0] @ downs[0] + own @ downs[1])
    y = nn.functional.linear(x, weight)
    y.square().sum().backward()
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(ups[1].grad, own.grad, rtol=1e-4, atol=1e-4)
    assert len(plan.names) == 2 * 7


def test_nothing_left_to_learn_with_is_an_error(
    tiny_folder: Path, open_folder: Any, tmp_path: Path
) -> None:
    backbone = open_folder(tiny_folder)
    path = tmp_path / "0.safetensors"
    look = looker(backbone, inputs(128, 128, 0, 300))
    learn(backbone, 0, None, path, look, energy=(1.0, 1.0))
    backbone = open_folder(tiny_folder)
    with pytest.raises(ValueError, match=r"use all 128 input directions of unet\.mid_block"):
        learn(backbone, 1, path, tmp_path / "1.safetensors", looker(backbone, torch.ones(2, 128)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"task": 5}, "task=5 is beyond num_tasks=5", id="task"),
        pytest.param({"energy": [1.0, 0.9]}, "must rise within 0 and 1", id="falling"),
        pytest.param({"energy": [0.9, 1.1]}, "must rise within 0 and 1", id="above-one"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"inflora": options})
    assert message in str(error.value)


def test_convolutions_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="conv_in is a convolution; name linear layers"):
        apply_methods(tiny, {"inflora": Inflora(rank=2, layers=("conv_in",))})
