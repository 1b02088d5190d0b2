"""Concepts one after another: real runs of two tasks, killed and gone on with, and what may not
be."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import start
from safetensors.torch import load_file

from trainer.cli.fit import train_recipe
from trainer.config.load import load_recipe, task_recipe
from trainer.config.schema import RecipeError
from trainer.config.tree import merge_trees
from trainer.continual import run_continual, summary
from trainer.data.identity import sha256_of_file
from trainer.evaluation.examiner import Examiner
from trainer.runs.adapter import load_adapted
from trainer.training.fit import fit

CLIP = Path(__file__).parent.parent / "data" / "tiny" / "clip"
METHODS: dict[str, dict[str, Any]] = {
    "c_lora": {"c_lora": {"rank": 2}},
    "inflora": {"inflora": {"rank": 2}},
    "coda_prompt": {"coda_prompt": {"pool": 6, "length": 4}},
    "lora": {"lora": {"rank": 2, "sites": "cross"}},
}
STEPS = 12


def write(folder: Path, backbone: Path, methods: dict[str, Any], **more: Any) -> str:
    """The word that names a continual recipe of two sprites."""
    tree: dict[str, Any] = {
        "backbone": str(backbone),
        "data": {
            "source": "concept",
            "concept": "sprite:penguin",
            "augment": False,
            "prior_images": 2,
            "prior_steps": 2,
            "prior_prompts": ["a fox", "a cat left of a tree"],
        },
        "methods": {**methods, "new_token": {"init": "animal"}},
        "optim": {"lr": 1e-2},
        "run": {
            "steps": 2, "batch_size": 2, "checkpoint_every": 1, "validate_every": 0,
            "out": str(folder / "runs"), "id": "x",
        },
        "preview": {"steps": 2, "guidance": 2},
        "evaluate": {"alone": ["a <v1> on a blue background", "a photo of a <v1>"], "steps": 3},
        "continual": {
            "concepts": ["sprite:penguin", "sprite:panda"], "images": 2, "judge": str(CLIP),
        },
        "tracker": "none",
    }  # fmt: skip
    path = folder / "two.yaml"
    path.write_text(yaml.safe_dump(merge_trees(tree, more)), encoding="utf-8")
    return f"recipe={path}"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", METHODS)
def test_two_tasks(
    name: str, tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [write(tmp_path, tiny_folder, METHODS[name])]
    folder = run_continual(load_recipe(words))
    assert folder == tmp_path / "runs" / "two" / "x"
    first, second = (load_file(folder / f"task-{t}" / "adapter.safetensors") for t in range(2))
    facts = json.loads((folder / "continual.json").read_text())
    assert [len(row) for row in facts["accuracy"]] == [1, 2]
    assert all(0 <= value <= 1 for row in facts["accuracy"] for value in row)
    assert facts["forgetting"] == facts["accuracy"][0][0] - facts["accuracy"][1][0]
    assert facts["mean final accuracy"] == sum(facts["accuracy"][1]) / 2
    shown = capfd.readouterr().err
    assert "sprite:panda" in shown and "forgetting" in shown
    assert set(first) <= set(second)
    moved = {key for key, value in first.items() if not torch.equal(second[key], value)}
    if name == "lora":  # one pair of matrices for all concepts
        assert moved == {key for key in first if ".lora_" in key}
    elif name == "inflora":  # what it remembers grows
        assert moved and all(key.endswith("inflora_kept") for key in moved)
    else:
        assert not moved
    model, tree = load_adapted(folder / "task-1" / "adapter.safetensors")
    assert tree["data"]["concept"] == "sprite:panda" and tree["data"]["token"] == "<v2>"
    assert {"<v1>", "<v2>"} <= set(model.tokenizer.get_vocab())
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert run_continual(load_recipe(words)) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before
    assert "forgetting" in capfd.readouterr().err


def test_killed_inside_the_second_task_it_goes_on_there(tmp_path: Path, tiny_folder: Path) -> None:
    changes = {"run": {"steps": STEPS}, "continual": {"images": 0, "judge": None}}
    words = [write(tmp_path, tiny_folder, METHODS["inflora"], **changes)]
    whole = run_continual(load_recipe([*words, "run.id=whole"]))
    folder = whole.with_name("killed")
    place = folder / "task-1"
    process = start("fit", *words, "run.id=killed", printed=tmp_path)
    deadline = time.monotonic() + 240
    while not list(place.glob("checkpoints/step-*")):
        assert process.is_alive(), (tmp_path / "stderr").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (place / "adapter.safetensors").exists()
    trained = (folder / "task-0" / "adapter.safetensors").stat().st_mtime_ns
    assert run_continual(load_recipe([*words, "run.id=killed"])) == folder
    assert (folder / "task-0" / "adapter.safetensors").stat().st_mtime_ns == trained
    for task in range(2):
        one, other = (
            load_file(each / f"task-{task}" / "adapter.safetensors") for each in (whole, folder)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (folder / "continual.json").exists()


def test_judged_tasks_are_not_judged_again(tmp_path: Path, tiny_folder: Path) -> None:
    """Stopped between judging the first task and training the second."""
    words = [write(tmp_path, tiny_folder, METHODS["lora"], continual={"images": 2})]
    one = run_continual(load_recipe(words))
    facts = json.loads((one / "continual.json").read_text())
    facts["accuracy"] = [[0.123]]
    (one / "continual.json").write_text(json.dumps(facts))
    (one / "task-1" / "adapter.safetensors").unlink()
    run_continual(load_recipe(words))
    again = json.loads((one / "continual.json").read_text())
    assert again["accuracy"][0] == [0.123]
    assert len(again["accuracy"]) == 2
    with pytest.raises(ValueError, match=r"was made with continual\.images=2, and this run has 3"):
        run_continual(load_recipe([*words, "continual.images=3"]))
    with pytest.raises(ValueError, match=r"holds a finished run with another optim\.lr"):
        run_continual(load_recipe([*words, "optim.lr=0.5"]))


def test_a_judge_without_memory_ends_no_learning(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Both concepts are learned; the same command judges them later, by the same prompts alone."""
    words = [write(tmp_path, tiny_folder, METHODS["lora"], continual={"images": 2})]

    def accuracy(self: Examiner, model: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(Examiner, "accuracy", accuracy)
        folder = run_continual(load_recipe(words))
    assert "task-0/adapter.safetensors failed: OutOfMemoryError: CUDA" in capfd.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("adapter.safetensors")}
    assert len(made) == 2 and not (folder / "continual.json").exists()
    assert '"evaluation_failed"' in (folder / "events.jsonl").read_text()
    run_continual(load_recipe(words))
    assert {path: path.stat().st_mtime_ns for path in made} == made
    facts = json.loads((folder / "continual.json").read_text())
    assert [len(row) for row in facts["accuracy"]] == [1, 2]
    with pytest.raises(ValueError, match=r"was made with evaluate\.alone=\[.*choose another"):
        run_continual(load_recipe([*words, "evaluate.alone=[a <v1>]"]))


def test_forgetting_by_hand() -> None:
    facts = summary([[0.9], [0.5, 1.0], [0.3, 0.8, 0.7]])
    assert facts["mean final accuracy"] == pytest.approx(0.6)
    assert facts["forgetting"] == pytest.approx((0.6 + 0.2) / 2)
    assert summary([[0.4]]) == {"mean final accuracy": 0.4, "forgetting": None}
    assert summary([[None], [None, 0.5]]) == {"mean final accuracy": None, "forgetting": None}


def test_each_task_is_an_ordinary_recipe(tmp_path: Path, tiny_folder: Path) -> None:
    words = [
        write(tmp_path, tiny_folder, METHODS["inflora"]),
        "continual.tokens=[<a>, <b>]",
        "continual.class_words=[bird, bear]",
        "continual.inits=[animal, bear]",
        "preview.prompts=[a <v1> left of a fox]",
        "preview.maps=<v1>",
    ]
    whole = load_recipe(words)
    own = task_recipe(whole, 1, Path("earlier"))
    assert own.continual.concepts == ()
    assert own.run.start_from == Path("earlier")
    assert (own.data.concept, own.data.token, own.data.class_word) == (
        "sprite:panda",
        "<b>",
        "bear",
    )
    assert own.preview.prompts == ("a <b> left of a fox",) and own.preview.maps == "<b>"
    assert own.evaluate.alone == ("a <b> on a blue background", "a photo of a <b>")
    methods = {name: method.model_dump() for name, method in own.methods.items()}
    assert methods["inflora"]["task"] == 1 and methods["inflora"]["num_tasks"] == 2
    assert methods["new_token"]["tokens"] == ("<a>", "<b>")
    assert methods["new_token"]["init"] == ("animal", "bear")
    assert task_recipe(whole, 0).run.start_from is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            ["continual.concepts=[sprite:penguin, sprite:pengin]"],
            "continual.concepts.1: data.concept='sprite:pengin': no sprite is called pengin",
            id="sprite",
        ),
        pytest.param(
            ["continual.tokens=[<a>]"],
            "continual.tokens=['<a>'] for 2 concepts; give one each",
            id="tokens",
        ),
        pytest.param(
            ["continual.tokens=[<a>, <a>]"],
            "continual.concepts.0: methods.new_token.tokens",
            id="twice",
        ),
        pytest.param(["run.devices=2"], "learned on one device; set run.devices=1", id="devices"),
        pytest.param(["evaluate.alone=[]"], "evaluate.alone is empty", id="prompts"),
    ],
)
def test_what_cannot_be_run_is_refused_before_loading(
    words: list[str], message: str, tmp_path: Path, tiny_folder: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe([write(tmp_path, tiny_folder, METHODS["c_lora"]), *words])
    assert message in str(error.value)


def test_other_data_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    path = Path(write(tmp_path, tiny_folder, METHODS["c_lora"]).removeprefix("recipe="))
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, "data": {"source": "world", "count": 4}}))
    with pytest.raises(RecipeError, match=r"continual\.concepts needs data\.source=concept"):
        load_recipe([f"recipe={path}"])


def test_a_backbone_without_a_judge_is_told_before_training(
    tmp_path: Path, tiny_folder: Path
) -> None:
    words = [write(tmp_path, tiny_folder, METHODS["lora"], continual={"judge": None})]
    with pytest.raises(ValueError, match=r"has no judge of its own; give continual\.judge"):
        run_continual(load_recipe(words))
    assert not list(tmp_path.rglob("checkpoints"))


def test_fit_alone_refuses_several_concepts_and_the_command_trains_them(
    tmp_path: Path, tiny_folder: Path
) -> None:
    words = [write(tmp_path, tiny_folder, METHODS["lora"], continual={"images": 0})]
    with pytest.raises(ValueError, match=r"two\.yaml learns 2 concepts in .*run_continual"):
        fit(load_recipe(words))
    assert not (tmp_path / "runs").exists()
    folder = train_recipe(load_recipe(words), tmp_path / "given")
    assert folder == tmp_path / "given"
    assert all((folder / f"task-{task}" / "adapter.safetensors").is_file() for task in range(2))


def test_prompts_that_are_not_given_are_those_of_every_run(
    tmp_path: Path, tiny_folder: Path
) -> None:
    word = write(tmp_path, tiny_folder, METHODS["lora"])
    path = Path(word.removeprefix("recipe="))
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**tree, "evaluate": {"steps": 3}, "preview": {"steps": 2}}))
    whole = load_recipe([word])
    for number in range(2):
        task = task_recipe(whole, number)
        assert task.evaluate.alone
        for asked in ("evaluate.alone", "preview.prompts"):
            section, _, key = asked.partition(".")
            own, plain = (getattr(getattr(each, section), key) for each in (task, whole))
            word = whole.continual.words[number]
            assert own == tuple(each.replace("<v1>", word) for each in plain)


def test_learned_concepts_are_not_learned_further(tmp_path: Path, tiny_folder: Path) -> None:
    word = write(tmp_path, tiny_folder, METHODS["lora"], continual={"images": 0})
    folder = run_continual(load_recipe([word, "run.steps=1"]))
    before = [sha256_of_file(path) for path in sorted(folder.rglob("adapter.safetensors"))]
    assert len(before) == 2
    with pytest.raises(ValueError, match=r"concept 0 was learned in 1 steps.* run\.steps=1 to res"):
        run_continual(load_recipe([word, "run.steps=2"]))
    assert before == [sha256_of_file(path) for path in sorted(folder.rglob("adapter.safetensors"))]
    assert run_continual(load_recipe([word, "run.steps=1"])) == folder
