"""CODA-Prompt: prompts put together as the paper says, beside the context's keys and values; slices
of the pool by task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.export.export import export
from trainer.methods.apply import Plan, apply_methods
from trainer.ops.coda_prompt import PromptPool, orthonormal_beside
from trainer.runs.adapter import load_adapted, start_from
from trainer.training.build import prepare_methods

OPTIONS: dict[str, Any] = {"pool": 7, "length": 6, "num_tasks": 3}


def apply(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"coda_prompt": {**OPTIONS, **options}}))


def pool_of(counts: tuple[int, ...] = (2, 3), text: int = 9) -> PromptPool:
    torch.manual_seed(0)
    return PromptPool(counts, 6, 10, text)


def naive_prompt(pool: PromptPool, query: Tensor) -> Tensor:
    """One row, one part at a time."""
    rows = []
    for q in query:
        total = torch.zeros(6, 10)
        for task in pool.tasks:
            for P, K, A in zip(task.prompts, task.keys, task.attentions, strict=True):  # noqa: N806
                seen = q * A
                alpha = (seen @ K) / (seen.norm() * K.norm())
                total = total + alpha * P
        rows.append(total)
    return torch.stack(rows)


def test_prompt_against_a_plain_loop() -> None:
    pool = pool_of()
    query = torch.randn(4, 9)
    found, wanted = pool.prompt(query), naive_prompt(pool, query)
    torch.testing.assert_close(found, wanted)
    weight = torch.randn_like(found)
    grads = torch.autograd.grad((found * weight).sum(), list(pool.parameters()))
    naive = torch.autograd.grad((wanted * weight).sum(), list(pool.parameters()))
    for one, other in zip(grads, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_orthogonality_against_a_plain_loop() -> None:
    pool = pool_of()
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.normal_()
    wanted = torch.zeros(())
    for part in ("prompts", "keys", "attentions"):
        rows = [row.flatten() for task in pool.tasks for row in getattr(task, part)]
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                wanted = wanted + (one @ other - float(i == j)).square()
    torch.testing.assert_close(pool.orthogonality(), wanted)
    own = torch.autograd.grad(pool.orthogonality(), list(pool.parameters()))
    naive = torch.autograd.grad(wanted, list(pool.parameters()))
    for one, other in zip(own, naive, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_task_starts_with_orthonormal_parts() -> None:
    assert float(pool_of((4,)).orthogonality().detach()) < 1e-9


def largest_cosines(pool: PromptPool) -> list[float]:
    """Of P, K and A: the largest |cosine| between a part of the last task and any other part."""
    found = []
    for rows in (part.detach().flatten(1).double() for part in pool.parts()):
        last = len(rows) - len(pool.tasks[-1].keys)
        units = F.normalize(rows, dim=1)
        cosines = units @ units[last:].T
        cosines[last:].fill_diagonal_(0)
        found.append(float(cosines.abs().max()))
    return found


def gram_schmidt(taken: Tensor, rows: Tensor) -> Tensor:
    """One row at a time, each less its part along every earlier one."""
    basis: list[Tensor] = []
    for row in torch.cat([taken, rows]).double():
        for other in basis:
            row = row - (row @ other) * other
        basis.append(row / row.norm())
    return torch.stack(basis[len(taken) :])


def test_gram_schmidt_against_a_plain_loop() -> None:
    """Up to sign, and beside rows that are long and far from orthogonal."""
    torch.manual_seed(1)
    taken, rows = 3 + torch.randn(4, 9), torch.randn(3, 9)
    found, wanted = orthonormal_beside(taken, rows).double(), gram_schmidt(taken, rows)
    signs = (found * wanted).sum(1, keepdim=True).sign()
    torch.testing.assert_close(found * signs, wanted, rtol=1e-5, atol=1e-6)


def test_a_task_starts_orthogonal_to_all_earlier_ones() -> None:
    """Parts of earlier tasks are as training left them; they stay, bit for bit."""
    pool = pool_of((2, 3, 3))
    with torch.no_grad():
        for task in pool.tasks[:2]:
            for parameter in task.parameters():
                parameter.normal_().add_(1)
    earlier = {name: value.clone() for name, value in pool.named_parameters()}
    assert max(largest_cosines(pool)) > 0.1
    pool.separate()
    assert max(largest_cosines(pool)) <= 1e-6
    for parameter in pool.tasks[2].parameters():
        rows = parameter.detach().flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-6)
    for name, value in pool.named_parameters():
        assert torch.equal(value, earlier[name]) == (not name.startswith("tasks.2."))


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_a_site_attends_to_context_and_prompt(masked: str, tiny: Any) -> None:
    """The whole hosted forward of one site against attention written out."""
    apply(tiny, sites="cross & mid")
    (site,) = (site for site in tiny.sites if site.kind == "cross" and site.place == "mid")
    module: Any = site.module
    x, text = torch.randn(2, 5, 32), torch.randn(2, 7, 128)
    seen = torch.rand(2, 1, 7) > 0.4
    seen[..., 0] = True
    mask = None if masked == "none" else seen
    if masked == "float":
        mask = torch.zeros(2, 1, 7).masked_fill(~seen, -1e4)
    output = module(x, encoder_hidden_states=text, attention_mask=_per_head(mask, site.heads))
    prompt = module.coda_prompt.prompt(text.mean(1))
    k = torch.cat([module.to_k(text), prompt[:, :3]], dim=1)
    v = torch.cat([module.to_v(text), prompt[:, 3:]], dim=1)
    q, k, v = (t.unflatten(-1, (site.heads, -1)).transpose(1, 2) for t in (module.to_q(x), k, v))
    scores = q @ k.transpose(2, 3) * site.head_dim**-0.5
    if mask is not None:
        scores[..., :7] = scores[..., :7].masked_fill(~seen[:, None], -torch.inf)
    wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, module.to_out[0](wanted), rtol=1e-4, atol=1e-5)


def _per_head(mask: Tensor | None, heads: int) -> Tensor | None:
    return None if mask is None else mask.repeat_interleave(heads, dim=0)


def test_no_gradient_goes_through_the_query(tiny: Any) -> None:
    apply(tiny, sites="cross & mid")
    (site,) = (site for site in tiny.sites if site.kind == "cross" and site.place == "mid")
    pool: Any = site.module.coda_prompt
    text = torch.randn(2, 7, 128, requires_grad=True)
    q = torch.zeros(2, site.heads, 5, site.head_dim)
    call = SiteCall(site, StepContext(0, 1, torch.zeros(())))
    pool.context(text, text, call)
    _, k, v = pool.kv(q, q, q, call=call)
    assert k.shape == v.shape == (2, site.heads, 5 + 3, site.head_dim)
    (k.sum() + v.sum()).backward()
    assert text.grad is None
    assert pool.tasks[0].prompts.grad is not None


@pytest.mark.parametrize(("task", "counts"), [(0, [2]), (2, [2, 2, 3])])
def test_a_pool_that_tasks_do_not_divide(task: int, counts: list[int], tiny: Any) -> None:
    """Parts [t M / T, (t + 1) M / T) of 7 in 3 tasks: all of them are somebody's."""
    apply(tiny, task=task, sites="cross & mid")
    (site,) = (site for site in tiny.sites if site.kind == "cross" and site.place == "mid")
    assert [len(part.keys) for part in site.module.coda_prompt.tasks] == counts


def test_slices_of_the_pool(tiny: Any) -> None:
    """7 parts in 3 tasks: 2, 2, 3; only the last slice trains, later ones do not exist."""
    plan = apply(tiny, task=1)
    pools = [site.module.coda_prompt for site in tiny.sites if site.kind == "cross"]
    assert len(pools) == 7
    for pool in pools:
        assert [len(task.keys) for task in pool.tasks] == [2, 2]
    assert all(".coda_prompt.tasks.1." in name for name in plan.names)
    assert all(".coda_prompt.tasks.0." in name for name in plan.keeps)
    assert len(plan.names) == len(plan.keeps) == 7 * 3
    trains = {name for name, value in tiny.named_parameters() if value.requires_grad}
    assert trains == set(plan.names)


def test_three_tasks_one_after_another(
    tiny_folder: Path,
    open_folder: Callable[[Path], Any],
    train: Callable[..., list[float]],
    tmp_path: Path,
    save: Callable[..., dict[str, Tensor]],
) -> None:
    stored: dict[str, Tensor] = {}
    before: Path | None = None
    for task in range(3):
        backbone = open_folder(tiny_folder)
        plan = apply(backbone, task=task)
        if before is not None:
            start_from(before, backbone, plan)
        prepare = plan.edits["coda_prompt"].prepare
        assert prepare is not None
        prepare(lambda: pytest.fail("Gram-Schmidt looks at no data"))
        loss = plan.edits["coda_prompt"].loss
        assert loss is not None
        pools = [site.module.coda_prompt for site in backbone.sites if site.kind == "cross"]
        assert max(max(largest_cosines(pool)) for pool in pools) <= 1e-6
        torch.testing.assert_close(loss(None), 0.1 * sum(pool.orthogonality() for pool in pools))
        train(backbone, plan)
        own = dict(backbone.named_parameters())
        for name, value in stored.items():
            assert torch.equal(own[name], value)
        before = tmp_path / f"{task}.safetensors"
        stored = save(before, backbone, plan)
    assert len(stored) == 3 * 3 * 7


def test_gradient_checkpointing_finds_the_same_query(tiny: Any) -> None:
    apply(tiny)
    name, parameter = next((n, p) for n, p in tiny.named_parameters() if p.requires_grad)
    x = torch.randn(2, tiny.latent_channels, 8, 8)
    text = tiny.encode_prompts(["a fox", "a cat on a tree"])
    grads = []
    for again in (False, True):
        if again:
            tiny.enable_gradient_checkpointing()
            tiny.train()
        tiny.predict(x, torch.tensor([5, 600]), text).square().sum().backward()
        grads.append(parameter.grad.clone())
        parameter.grad = None
    assert grads[0].abs().max() > 0, name
    torch.testing.assert_close(grads[1], grads[0])


def test_no_penalty_when_it_is_off(tiny: Any) -> None:
    assert apply(tiny, ortho=0).edits["coda_prompt"].loss is None


def test_a_file_of_weights_cannot_hold_it(
    tiny: Any, tiny_folder: Path, tmp_path: Path, save: Callable[..., dict[str, Tensor]]
) -> None:
    plan = apply(tiny)
    path = tmp_path / "adapter.safetensors"
    tree = {"backbone": str(tiny_folder), "methods": {"coda_prompt": OPTIONS}}
    save(path, tiny, plan, tree)
    with pytest.raises(ValueError, match="format=merged cannot carry coda_prompt"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"task": 3}, "task=3 is beyond num_tasks=3", id="task"),
        pytest.param({"length": 5}, "methods.coda_prompt.length=5", id="odd"),
        pytest.param({"pool": 2}, "pool=2 has no part for each of num_tasks=3", id="pool"),
        pytest.param({"sites": "crosss"}, "unknown term", id="selector"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"coda_prompt": {"num_tasks": 3, **options}})
    assert message in str(error.value)


def test_self_attention_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="is self attention, which gets no text to choose prompts"):
        apply(tiny, sites="all")


def test_more_parts_than_can_be_orthogonal_are_refused_where_a_task_starts(tiny: Any) -> None:
    plan = apply(tiny, pool=129, sites="cross & mid")
    said = r"methods\.coda_prompt: pool=129: at .* no more than 128 parts"
    with pytest.raises(ValueError, match=said):
        prepare_methods(plan, lambda: pytest.fail("it is refused before any data is looked at"))


def test_an_adapter_with_more_parts_is_loaded(
    tiny: Any, tiny_folder: Path, tmp_path: Path, save: Callable[..., dict[str, Tensor]]
) -> None:
    """As it was trained when parts were orthogonal within a task alone."""
    options = {**OPTIONS, "pool": 150, "task": 2, "sites": "cross & mid"}
    plan = apply(tiny, **options)
    path = tmp_path / "adapter.safetensors"
    stored = save(
        path, tiny, plan, {"backbone": str(tiny_folder), "methods": {"coda_prompt": options}}
    )
    found = dict(load_adapted(path)[0].named_parameters())
    assert len(stored) == 3 * 3
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def test_only_the_direction_of_the_query_counts() -> None:
    """alpha is a cosine, so the length of q changes nothing."""
    pool, query = pool_of(), torch.randn(3, 9)
    torch.testing.assert_close(pool.prompt(query), pool.prompt(5 * query))
    assert not torch.allclose(pool.prompt(query), pool.prompt(F.normalize(query + 1, dim=1)))
