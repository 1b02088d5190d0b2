"""What every method owes: it starts at the base model where its paper says so, changes only what it
claims, and comes back from its adapter. Pairs of methods work together or are refused by name.

There are too many cases to try each of them every time. Plain `pytest` tries a third or half of the
cases of every method, pairs of `REPRESENTATIVES` and `DRAWN` others, another choice in every run: a
run prints CASE_SEED=<n>, and the same environment variable repeats its choice. `CASES=all pytest`
tries all of these, `pytest -m pairs` every pair.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from method_examples import EXAMPLES, IN_STACKS, tree_of
from torch import Tensor

from trainer.attention.context import StepContext, use
from trainer.attention.hooks import SourceBranch
from trainer.attention.input_channels import inputs_read
from trainer.attention.op import Traits
from trainer.common.lookup import method_files
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.data.references import REFERENCE
from trainer.diffusion.edit_source import EditSource, source_branch
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import Plan, apply_methods, find_method, method_names
from trainer.methods.shared.swap import Swap
from trainer.ops.attention_maps import MapStore
from trainer.runs.adapter import load_adapted, save_adapter

# methods whose paper does not start from the base model's own output
NOT_EXACT_AT_START: set[str] = {
    "agent_attention",
    "at_edm",
    "coda_prompt",
    "flashmask",
    "gated_linear",
    "linear_attention",
    "nf4",
    "sla",
    "soft",
    "toma",
    "tome",
}
# methods under which the frames of a clip read each other from the start, exact for images alone
ALIGNED: set[str] = {"pix2video", "text2video_zero", "tune_a_video", "videop2p"}
# methods that compute the same in another order
ROUNDED_AT_START: set[str] = {"tiled"}
NAMES = method_names()
# one method of every kind and set of claimed aspects, and a second one of the same, if there is any
REPRESENTATIVES: dict[str, str | None] = {
    "animatediff": "vdm",
    "coda_prompt": "ip_adapter",
    "diffumask": None,
    "ediff_i": None,
    "full": "selective",
    "gated_linear": "agent_attention",
    "gaussctrl": None,
    "longlora": None,
    "lora": "dora",
    "new_token": "word_embedding",
    "nf4": None,
    "p2p": "masactrl",
    "pix2video": None,
    "text2video_zero": None,
    "tiled": "flash",
    "tome": "toma",
    "tune_a_video": None,
    "videop2p": None,
}
DRAWN = 6  # pairs besides those of representatives
SEED = os.environ["CASE_SEED"]  # tests/conftest.py draws it
SWAPS = [name for name in NAMES if issubclass(find_method(name), Swap)]
# what a swap is to go with, by the options that differ from EXAMPLES
STACKS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"lora": {"sites": "self", "dropout": 0}},
    "nf4+lora": {"nf4": {}, "lora": {"sites": "all", "dropout": 0}},
    "new_token+selective": {"new_token": {}, "selective": {}},
    "new_token+nf4+dora": {"new_token": {}, "nf4": {}, "dora": {}},
    "coda_prompt": {"coda_prompt": {}},
}
each_method = pytest.mark.parametrize("name", NAMES)
Pair = tuple[str, str]
Train = Callable[..., list[float]]


def all_pairs() -> list[Pair]:
    return list(itertools.combinations(NAMES, 2))


def representative_pairs() -> list[Pair]:
    """Of two kinds or sets of claims each, and of one where it has two methods."""
    alike = [tuple(sorted(pair)) for pair in REPRESENTATIVES.items() if pair[1] is not None]
    chosen = {*itertools.combinations(sorted(REPRESENTATIVES), 2), *alike}
    return [pair for pair in all_pairs() if pair in chosen]


def drawn_pairs(seed: str) -> list[Pair]:
    others = [pair for pair in all_pairs() if pair not in representative_pairs()]
    return random.Random(seed).sample(others, min(DRAWN, len(others)))


def each_pair(pairs: list[Pair]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("pair", pairs, ids="+".join)


each_swap = pytest.mark.parametrize("swap", SWAPS)


@pytest.fixture(params=["unet", "dit"])
def denoiser(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def tiny_folder(
    denoiser: str, tiny_folder: Path, dit_folder: Path, request: pytest.FixtureRequest
) -> Path:
    """Every method is held to the same on both kinds of denoiser."""
    if denoiser == "dit":
        return dit_folder
    asked = request.node.callspec.params
    stacked = IN_STACKS & {asked.get("name"), *asked.get("pair", ())}
    return request.getfixturevalue("stacked_folder") if stacked else tiny_folder


def state(backbone: Any) -> dict[str, Tensor]:
    """Parameters and buffers, by name."""
    tensors = [*backbone.named_parameters(), *backbone.named_buffers()]
    return {name: value.detach().clone() for name, value in tensors}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def frames(*names: str) -> int:
    """Of the clips that methods are tested with: 1, images, unless one is about time."""
    inserts = any(find_method(name).kind == "structure" for name in names)
    return 2 if inserts or ALIGNED & set(names) else 1


def predictions(backbone: Any, frames: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, backbone.latent_channels, 8, 8, generator=generator)
    condition = backbone.encode_prompts(["a fox on a red background", ""])
    t = torch.tensor([20, 700])
    with torch.no_grad(), use(StepContext(0, 1, t, frames)):
        output: Tensor = backbone.predict(x_t, t, condition)
    return output


def painted(backbone: Any, frames: int = 1) -> Tensor:
    branch = source_branch(backbone)
    return sample(
        backbone,
        ["a <v1> on a red background", "a fox on a red background"],
        [3, 4],
        settings=Sampling(steps=2, guidance=3, frames=frames),
        edited=None if branch is None else source_for(backbone, branch[1]),
        inputs=given(backbone),
    )


def source_for(backbone: Any, branch: SourceBranch) -> EditSource | None:
    """What a method that edits a source may ask a user for."""
    if branch.prompt is None:
        return None
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8, :8] = 1
    x = torch.randn(1, backbone.latent_channels, 8, 8, generator=torch.Generator().manual_seed(2))
    known = {step: x / (step + 1) for step in range(3)} if branch.inverts or branch.refers else {}
    return EditSource(
        branch.prompt,
        inverted=bool(known),
        trajectory=known,
        reference=known,
        masks={"source": mask, "target": mask},
    )


def given(backbone: Any) -> dict[str, Tensor]:
    """A reference picture, for methods that read one."""
    if REFERENCE not in inputs_read(backbone):
        return {}
    return {
        REFERENCE: torch.linspace(-1, 1, 3 * 32 * 32)
        .view(1, 1, 3, 32, 32)
        .expand(2, -1, -1, -1, -1)
    }


def reloaded(backbone: Any, plan: Plan, tree: Any, folder: Path, where: Path) -> Any:
    """The same from its adapter's file."""
    own = state(backbone)
    tensors = {key: own[key] for key in plan.stored}
    header = {"backbone": str(folder), "methods": tree}
    save_adapter(where / "adapter.safetensors", tensors, header, backbone.identity())
    return load_adapted(where / "adapter.safetensors")[0]


def test_there_is_a_method_to_test() -> None:
    assert {"full", "new_token", "selective"} <= set(NAMES)


def test_every_example_is_of_a_method() -> None:
    assert set(EXAMPLES) <= set(NAMES), "a row of EXAMPLES names no method; remove it"


@pytest.mark.sampled(len(NAMES) // 2)
@each_method
def test_what_trains_is_fp32_whatever_the_base_is(name: str, tiny: Any) -> None:
    """A base in bf16, as something else may have left it."""
    tiny.denoiser.to(torch.bfloat16)
    tiny.text_encoder.to(torch.bfloat16)
    plan = apply_methods(tiny, methods_of(tree_of(name)))
    parameters = dict(tiny.named_parameters())
    assert {parameters[each].dtype for each in plan.names} == {torch.float32}


@pytest.mark.sampled(len(NAMES) // 2)
@each_method
def test_only_what_it_claims_changes(
    name: str, tiny: Any, train: Callable[..., list[float]]
) -> None:
    plan = apply_methods(tiny, methods_of(tree_of(name)))
    for edit in plan.edits.values():
        assert set(edit.trains) <= {path for path, _ in edit.claims}
    assert set(plan.names) == {path for edit in plan.edits.values() for path in edit.trains}
    before = state(tiny)
    train(tiny, plan, frames=frames(name))
    assert changed(before, state(tiny)) == set(plan.names)


@pytest.mark.sampled(len(NAMES) // 2)
@each_method
def test_what_it_keeps_is_the_base(name: str, tiny: Any) -> None:
    base = state(tiny)
    plan = apply_methods(tiny, methods_of(tree_of(name)))
    edit, kind = plan.edits[name], find_method(name).kind
    rounded = {path for path, _ in edit.claims} if kind == "storage" else set()
    values = {value.data_ptr(): value for value in (*tiny.parameters(), *tiny.buffers())}.values()
    found = {(value.shape, value.detach().numpy().tobytes()) for value in values}
    for path, value in base.items():
        assert path in rounded or (value.shape, value.numpy().tobytes()) in found, path


@pytest.mark.sampled(len(NAMES) // 2)
@each_method
def test_exact_at_start(name: str, tiny: Any) -> None:
    if name in NOT_EXACT_AT_START:
        pytest.skip("its paper does not start from the base model's output")
    base = predictions(tiny)
    apply_methods(tiny, methods_of(tree_of(name)))
    if name in ROUNDED_AT_START:
        torch.testing.assert_close(predictions(tiny), base, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(predictions(tiny), base)
        on_clips = torch.equal(predictions(tiny, frames(name)), base)
        assert on_clips == (name not in ALIGNED)


@pytest.mark.sampled(len(NAMES) // 3)
@each_method
def test_saved_and_loaded_is_the_same(
    name: str, tiny: Any, tiny_folder: Path, tmp_path: Path, train: Callable[..., list[float]]
) -> None:
    tree = tree_of(name)
    plan = apply_methods(tiny, methods_of(tree))
    count = frames(name)
    untrained = painted(tiny, count)
    train(tiny, plan, frames=count)
    trained = painted(tiny, count)
    assert not torch.equal(trained, untrained)
    again = reloaded(tiny, plan, tree, tiny_folder, tmp_path)
    assert torch.equal(painted(again, count), trained)


def test_importing_a_method_loads_no_torch() -> None:
    names = [f"trainer.methods.{path.parent.name}.{path.stem}" for path in method_files()]
    assert len(names) == len(NAMES)
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "    heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", [n for n in NAMES if "sites" in find_method(n).model_fields])
def test_a_wrong_selector_is_refused_before_loading(name: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({name: {**tree_of(name)[name], "sites": "crosss"}})
    assert f"methods.{name}.sites='crosss': " in str(error.value)
    assert "did you mean 'cross'?" in str(error.value)


@each_method
def test_its_options_survive_the_header(name: str) -> None:
    """What an adapter stores and what a recipe says must make the same method."""
    method = methods_of(tree_of(name))[name]
    assert methods_of({name: method.model_dump(mode="json")})[name] == method


@pytest.fixture(scope="session")
def signature(dit_folder: Path, open_folder: Callable[[Path], Any]) -> Callable[[str], Any]:
    """The kind of a method and the set of aspects it claims."""

    @functools.cache
    def find(name: str) -> Any:
        plan = apply_methods(open_folder(dit_folder), methods_of(tree_of(name)))
        return find_method(name).kind, frozenset(aspect for _, aspect in plan.edits[name].claims)

    return find


@each_method
def test_a_representative_stands_for_it(name: str, signature: Callable[[str], Any]) -> None:
    assert signature(name)[1], f"{name} claims nothing, so that it could not be refused by name"
    same = [other for other in REPRESENTATIVES if signature(other) == signature(name)]
    assert len(same) == 1, f"add {name} to REPRESENTATIVES: none has {signature(name)}"
    second = REPRESENTATIVES[same[0]]
    alike = [other for other in NAMES if signature(other) == signature(name)]
    if second is None:
        assert alike == same, f"name a second method beside {same[0]} in REPRESENTATIVES"
    else:
        assert second in alike and second != same[0]


def test_the_drawn_pairs_follow_the_seed() -> None:
    first, second = drawn_pairs("1"), drawn_pairs("2")
    assert drawn_pairs("1") == first != second
    assert len(set(first)) == DRAWN
    assert not set(first) & set(representative_pairs())


@pytest.mark.sampled(16)
@each_pair(representative_pairs())
def test_representatives_compose_or_are_refused_by_name(
    pair: Pair, tiny_folder: Path, open_folder: Callable[[Path], Any], train: Train
) -> None:
    compose_or_refuse(pair, open_folder(tiny_folder), open_folder(tiny_folder), train)


@each_pair(drawn_pairs(SEED))
def test_drawn_pairs_compose_or_are_refused_by_name(
    pair: Pair, tiny_folder: Path, open_folder: Callable[[Path], Any], train: Train
) -> None:
    print(f"this choice of pairs: CASE_SEED={SEED}")
    compose_or_refuse(pair, open_folder(tiny_folder), open_folder(tiny_folder), train)


@pytest.mark.pairs
@each_pair(all_pairs())
def test_every_pair_composes_or_is_refused_by_name(
    pair: Pair, tiny_folder: Path, open_folder: Callable[[Path], Any], train: Train
) -> None:
    compose_or_refuse(pair, open_folder(tiny_folder), open_folder(tiny_folder), train)


def compose_or_refuse(pair: Pair, backbone: Any, reversed_backbone: Any, train: Train) -> None:
    """Both orders of a recipe do the same: the same parameters train to the same losses and nothing
    else changes, or an error names both methods."""
    first, second = pair
    tree = tree_of(first, second)
    backwards = methods_of(dict(reversed(tree.items())))
    try:
        plan = apply_methods(backbone, methods_of(tree))
    except ValueError as error:
        with pytest.raises(ValueError) as other_way:
            apply_methods(reversed_backbone, backwards)
        for message in (str(error), str(other_way.value)):
            assert f"methods.{first}" in message
            assert f"methods.{second}" in message
        return
    other = apply_methods(reversed_backbone, backwards)
    assert other.names == plan.names
    assert {name: edit.trains for name, edit in other.edits.items()} == {
        name: edit.trains for name, edit in plan.edits.items()
    }
    before = state(backbone)
    losses = train(backbone, plan, frames=frames(first, second))
    assert all(torch.isfinite(torch.tensor(losses)))
    for name in (first, second):
        assert plan.edits[name].claims
        assert set(plan.edits[name].trains) <= set(plan.names)
    assert changed(before, state(backbone)) == set(plan.names)
    assert train(reversed_backbone, other, frames=frames(first, second)) == losses


@pytest.mark.sampled(5)
@pytest.mark.parametrize("stack", STACKS)
@each_swap
def test_a_swap_goes_with(
    swap: str,
    stack: str,
    tiny: Any,
    tiny_folder: Path,
    tmp_path: Path,
    train: Callable[..., list[float]],
) -> None:
    """Distilled or not, with adapters on the same layers in 4 bits, with new words and prompts."""
    others = {name: EXAMPLES[name] | more for name, more in STACKS[stack].items()}
    tree = {swap: EXAMPLES[swap] | {"sites": "self", "distill": 1.0}} | others
    plan = apply_methods(tiny, methods_of(tree))
    assert set(plan.edits) == set(tree)
    before = state(tiny)
    assert all(torch.isfinite(torch.tensor(train(tiny, plan))))
    assert changed(before, state(tiny)) == set(plan.names)
    loss = plan.edits[swap].loss
    assert loss is not None
    tiny.zero_grad()
    condition = tiny.encode_prompts(["a <v1> on a red background"])
    tiny.predict(torch.ones(1, tiny.latent_channels, 8, 8), torch.tensor([700]), condition)
    distilled = loss(None)
    distilled.backward()
    parameters = dict(tiny.named_parameters())
    found = {name: parameters[name].grad for name in plan.names}
    taught = [grad for grad in found.values() if grad is not None and bool(grad.any())]
    assert float(distilled.detach()) > 0
    assert taught and all(bool(grad.isfinite().all()) for grad in taught)
    trained = painted(tiny)
    assert torch.equal(painted(reloaded(tiny, plan, tree, tiny_folder, tmp_path)), trained)


class Windows:
    name = "windows"
    traits = Traits()

    def mask(self, mask: Tensor | None, **_: Any) -> Tensor | None:
        return mask


class Sharper:
    name = "sharper"
    traits = Traits(scores=True)

    def scores(self, scores: Tensor, *_: Any) -> Tensor:
        return 2 * scores


@pytest.mark.sampled(10)
@pytest.mark.parametrize("reader", [Windows(), Sharper(), MapStore([1])], ids=lambda op: op.name)
@pytest.mark.parametrize("swap_first", [False, True])
@each_swap
def test_masks_scores_and_maps_are_refused_where_a_swap_runs(
    swap: str, swap_first: bool, reader: Any, tiny: Any
) -> None:
    sites = [site for site in tiny.sites if site.kind == "self"]
    chosen = methods_of({swap: EXAMPLES[swap] | {"sites": "self"}})[swap]
    steps = [lambda: chosen.apply(tiny), lambda: tiny.host.install(reader, sites)]
    first, second = steps if swap_first else steps[::-1]
    first()
    with pytest.raises(ValueError) as error:
        second()
    for part in (f"op {reader.name!r}", f"methods.{swap}", sites[0].name, "choose other sites"):
        assert part in str(error.value)
