"""A backbone that is the result of an earlier run, by its folder or adapter: what the run made
stays as it is, and what is trained over it finds it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.config.header import ADAPTER_FORMAT, HEADER, read_header
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.ops.distillation import Original
from trainer.runs.adapter import load_adapted, load_base, save_adapter, start_from

SWAP = {
    "linear_attention": {"sites": "self", "distill": 1.0},
    "selective": {"sites": "self", "projections": ["q", "k", "v", "out"]},
}
LORA = {"lora": {"sites": "self | cross", "rank": 2}}


@pytest.fixture(params=["unet", "dit"])
def folder(request: pytest.FixtureRequest, tiny_folder: Path, dit_folder: Path) -> Path:
    return tiny_folder if request.param == "unet" else dit_folder


@pytest.fixture
def learn(
    train: Callable[..., list[float]], tmp_path: Path
) -> Callable[[str, dict[str, Any], str], Path]:
    def run(name: str, tree: dict[str, Any], backbone: str) -> Path:
        """A run folder with the adapter of a few steps over `backbone`."""
        model = load_base(backbone_spec(backbone), backbone)
        plan = apply_methods(model, methods_of(tree))
        train(model, plan)
        tensors = {key: dict(model.named_parameters())[key] for key in plan.stored}
        path = tmp_path / name / "adapter.safetensors"
        path.parent.mkdir()
        save_adapter(
            path, tensors, tree={"backbone": backbone, "methods": tree}, identity=model.identity()
        )
        return path.parent

    return run


def opened(name: Path) -> Any:
    return load_base(backbone_spec(str(name)), str(name))


def predicted(model: Any) -> Tensor:
    x = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.predict(x, torch.tensor([3]), model.encode_prompts(["a fox"]))


def test_it_is_the_run(folder: Path, learn: Any) -> None:
    run = learn("swap", SWAP, str(folder))
    wanted = predicted(load_adapted(run / "adapter.safetensors")[0])
    assert torch.equal(predicted(opened(run)), wanted)
    assert torch.equal(predicted(opened(run / "adapter.safetensors")), wanted)
    assert not torch.allclose(predicted(opened(folder)), wanted, atol=1e-3)
    assert not any(p.requires_grad for p in opened(run).parameters())


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "over",
    [
        LORA,
        {"nf4": {"min_size": 256}, **LORA},
        {"dora": {"sites": "self", "rank": 2}},
        {"selective": {"sites": "all"}, "new_token": {"tokens": ["<v1>"], "init": "fox"}},
        {"full": {}},
        {"vdm": {"heads": 2}},
    ],
    ids=lambda tree: "+".join(tree),
)
def test_what_trains_over_a_swapped_model(over: dict[str, Any], folder: Path, learn: Any) -> None:
    run = learn("swap", SWAP, str(folder))
    later = learn("later", over, str(run))
    stored, own = load_file(later / "adapter.safetensors"), load_file(run / "adapter.safetensors")
    if "selective" not in over and "full" not in over:
        assert not stored.keys() & own.keys()  # its own tensors alone
    model, _ = load_adapted(later / "adapter.safetensors")
    held = dict(model.named_parameters())
    assert all(torch.equal(held[name], value) for name, value in stored.items())
    assert any(op.name == "linear_attention" for site in model.sites for op in ops(model, site))


def ops(model: Any, site: Any) -> Any:
    return model.host.processors[site.name].ops


def test_three_runs_one_over_the_other(folder: Path, learn: Any) -> None:
    first = learn("first", SWAP, str(folder))
    second = learn("second", {"selective": {"sites": "cross"}}, str(first))
    third = learn("third", LORA, str(second))
    assert backbone_spec(str(third)).adapters == tuple(
        str(run / "adapter.safetensors") for run in (first, second, third)
    )
    wanted = predicted(load_adapted(third / "adapter.safetensors")[0])
    assert torch.equal(predicted(opened(third)), wanted)


def test_the_distillation_of_a_run_that_is_over_costs_nothing(
    tiny_folder: Path, learn: Any
) -> None:
    model = opened(learn("swap", SWAP, str(tiny_folder)))
    plan = apply_methods(model, methods_of(LORA))
    model.denoiser.train()
    model.predict(
        torch.randn(1, 8, 8, 8), torch.tensor([3]), model.encode_prompts(["a fox"])
    ).sum().backward()
    held = [op for site in model.sites for op in ops(model, site) if isinstance(op, Original)]
    assert held and not any(op.distillation.terms for op in held)
    assert all(edit.loss is None for edit in plan.edits.values())


def test_another_run_below_is_refused(tiny_folder: Path, learn: Any) -> None:
    run = learn("swap", SWAP, str(tiny_folder))
    later = learn("later", LORA, str(run)) / "adapter.safetensors"
    with pytest.raises(ValueError, match=r"was trained on backbone .*swap \(adapters"):
        load_adapted(later, str(tiny_folder))
    below = run / "adapter.safetensors"
    tree, identity = read_header(below)
    tensors = {name: value + 1e-3 for name, value in load_file(below).items()}
    save_adapter(below, tensors, tree=tree, identity=identity)
    with pytest.raises(ValueError, match="adapters"):
        load_adapted(later)


def test_the_same_adapters_twice_are_refused_by_name(tiny_folder: Path, learn: Any) -> None:
    model = opened(learn("one", LORA, str(tiny_folder)))
    with pytest.raises(ValueError, match=r"methods\.lora: the adapter of .* or its export with"):
        apply_methods(model, methods_of(LORA))


@pytest.mark.parametrize("kernel", ["linear_attention", "gated_linear", "flash"])
def test_a_kernel_over_a_kernel_is_refused_by_name(
    tiny_folder: Path, learn: Any, kernel: str
) -> None:
    backbone = opened(learn("swap", SWAP, str(tiny_folder)))
    said = rf"methods\.{kernel}: the kernel of .* belongs to methods\.linear_attention, by the run"
    with pytest.raises(ValueError, match=said) as caught:
        apply_methods(backbone, methods_of({kernel: {"sites": "self"}}), trains=False)
    assert "merged" not in str(caught.value)  # no file of weights can hold a kernel


def test_an_export_would_lack_the_run_below(tiny_folder: Path, learn: Any, tmp_path: Path) -> None:
    run = learn("one", {"selective": {"sites": "cross"}}, str(tiny_folder))
    later = learn("later", LORA, str(run))
    with pytest.raises(ValueError, match=r"on top of another, .*one, which no format includes"):
        export(later / "adapter.safetensors", tmp_path / "out", "kohya")
    assert not (tmp_path / "out").exists()


def test_going_on_from_a_run_loses_nothing_of_it(tiny_folder: Path, learn: Any) -> None:
    """Its weights have a place in every model, but an adapter of K and V alone would leave them."""
    run = learn("swap", SWAP, str(tiny_folder)) / "adapter.safetensors"
    model = opened(tiny_folder)
    chosen = {"linear_attention": SWAP["linear_attention"], "selective": {"sites": "cross"}}
    plan = apply_methods(model, methods_of(chosen))
    with pytest.raises(ValueError, match=r"stores no .*to_k.weight.* with backbone=.*swap"):
        start_from(run, model, plan)
    model = opened(tiny_folder)
    start_from(run, model, apply_methods(model, methods_of(SWAP)))
    assert torch.equal(predicted(model), predicted(opened(run)))


def test_a_recipes_values_for_the_backbone_hold_over_its_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    facts = {
        "format": ADAPTER_FORMAT,
        "recipe": {"backbone": "tiny", "methods": LORA},
        "backbone": {"name": "tiny"},
    }
    words = {HEADER: json.dumps(facts)}
    save_file({"x": torch.zeros(1)}, run / "adapter.safetensors", words)
    plain = load_recipe(["recipe=lora", "backbone=tiny"])
    over = load_recipe(["recipe=lora", f"backbone={run}"])
    assert over.run == plain.run and over.optim == plain.optim
    assert over.backbone.folder == plain.backbone.folder
    assert over.backbone.adapters == (str(run / "adapter.safetensors"),)
    with pytest.raises(RecipeError, match="has a network of its own"):
        load_recipe(["recipe=dit_scratch", f"backbone={run}"])


def test_runs_over_themselves_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for path, below in zip(paths, reversed(paths), strict=True):
        facts = {
            "format": ADAPTER_FORMAT,
            "recipe": {"backbone": str(below), "methods": LORA},
            "backbone": {"name": "x"},
        }
        save_file({"x": torch.zeros(1)}, path, {HEADER: json.dumps(facts)})
    with pytest.raises(RecipeError, match="names itself as its own backbone"):
        backbone_spec(str(paths[0]))


def test_a_file_that_is_no_adapter_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(RecipeError, match=r"backbone=.*other.* it is not an adapter of ours"):
        backbone_spec(str(path))


def test_a_network_made_from_nothing_is_made_again_below(tmp_path: Path) -> None:
    """Its shape is in the first run's header alone."""
    name = "dit_scratch"
    shape = {"width": 32, "depth": 2, "heads": 2, "sample_size": 8}
    chosen = load_recipe(["recipe=dit_scratch", *(f"denoiser.{k}={v}" for k, v in shape.items())])
    model = load_backbone(chosen.backbone, name)
    plan = apply_methods(model, chosen.methods)
    tensors = {key: dict(model.named_parameters())[key] for key in plan.stored}
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, tensors, tree=chosen.tree, identity=model.identity())
    words = ["recipe=lora", f"backbone={path}", "data.class_word=animal"]
    later = load_recipe(words)
    assert "denoiser" not in later.tree
    again = load_base(later.backbone, later.backbone_name)
    assert again.denoiser.config.num_layers == 2
    parameters = dict(again.named_parameters())
    assert all(torch.equal(parameters[key], value) for key, value in tensors.items())


EVA = {"lora": {"sites": "cross & mid", "rank": 2, "init": "eva"}}
INFLORA = {"inflora": {"sites": "cross & mid", "rank": 2, "task": 0, "num_tasks": 2}}
NEXT = {"inflora": {"sites": "cross & mid", "rank": 2, "task": 1, "num_tasks": 2}}
CODA = {"coda_prompt": {"pool": 4, "length": 4, "num_tasks": 2, "task": 0}}


@pytest.mark.parametrize(
    ("earlier", "tree", "starts"),
    [(EVA, EVA, False), (INFLORA, INFLORA, False), (INFLORA, NEXT, True), (CODA, CODA, False)],
    ids=["eva", "inflora", "inflora, next task", "coda_prompt"],
)
def test_what_a_run_starts_from_is_not_started_again(
    earlier: dict[str, Any], tree: dict[str, Any], starts: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """A start that depends on the data would write over what was learned; a next task has one."""
    model = opened(tiny_folder)
    plan = apply_methods(model, methods_of(earlier))
    assert next(iter(plan.edits.values())).prepare is not None
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    path = tmp_path / "adapter.safetensors"
    tensors = {name: held[name] for name in plan.stored}
    facts = {"backbone": str(tiny_folder), "methods": earlier}
    save_adapter(path, tensors, tree=facts, identity=model.identity())
    model = opened(tiny_folder)
    plan = start_from(path, model, apply_methods(model, methods_of(tree)))
    assert (next(iter(plan.edits.values())).prepare is not None) == starts


def test_a_frozen_method_has_no_start(tiny_folder: Path) -> None:
    model = opened(tiny_folder)
    methods = methods_of({**EVA, "selective": {"sites": "self"}})
    plan = apply_methods(model, methods, frozen=["lora"])
    assert plan.edits["lora"].prepare is None
