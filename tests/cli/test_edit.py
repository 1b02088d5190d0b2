"""`edit`: a sheet, the edits and a JSON, of a generated and of a real source, made again bit for
bit; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.__main__ import main
from trainer.cli.edit_options import EDITS, edit_recipes, with_recipe
from trainer.common.declared import commands_in, header_of
from trainer.common.exit_codes import BAD_RECIPE
from trainer.common.lookup import method_files
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.config.tree import read_yaml

Printed = pytest.CaptureFixture[str]
SOURCE, PROMPT = "a fox on a red background", "a cat on a red background"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    drawn = np.random.default_rng(0).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    path = tmp_path / "fox.png"
    Image.fromarray(drawn).save(path)
    return path


def made(printed: Printed, *words: str) -> list[Path]:
    printed.readouterr()
    assert main(["edit", *words]) == 0
    return [Path(line) for line in printed.readouterr().out.split("\n") if line]


def refused(printed: Printed, *words: str) -> str:
    printed.readouterr()
    assert main(["edit", *words]) == BAD_RECIPE
    return printed.readouterr().err


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_a_generated_picture_and_two_edits_of_it(tiny_folder: Path, capsys: Printed) -> None:
    """The second edit is the source, as its prompt is; the JSON repeats both."""
    words = (f"backbone={tiny_folder}", "steps=4", "seed=3", "recipe=p2p")
    found = made(capsys, *words, "prompt=a [fox->cat|fox] on a red background", "out=one")
    assert [path.name for path in found] == [
        f"a-cat-on-a-red-background-3{end}" for end in (".png", "-edit1.png", "-edit2.png", ".json")
    ]
    facts = json.loads(found[-1].read_text())
    assert [each["prompt"] for each in facts["edits"]] == [PROMPT, SOURCE]
    assert facts["options"]["source"] == SOURCE
    assert facts["options"]["methods"]["p2p"]["cross_steps"] == [0.0, 0.8]
    (plain,) = sampled(capsys, f"backbone={tiny_folder}", f"prompt={SOURCE}")
    assert np.abs(pixels(found[2]) - pixels(plain)).max() <= 1
    assert np.abs(pixels(found[1]) - pixels(plain)).max() > 4
    for name in (found[-1], found[0], found[1]):
        assert main(["edit", f"from={name}", "out=again"]) == 0
        assert "repeated, bit for bit" in capsys.readouterr().err
    assert (Path("again") / found[1].name).read_bytes() == found[1].read_bytes()


def sampled(printed: Printed, *words: str) -> list[Path]:
    printed.readouterr()
    assert main(["sample", *words, "steps=4", "guidance=7.5", "seed=3", "out=plain"]) == 0
    return [Path(line) for line in printed.readouterr().out.split("\n") if line]


def test_a_real_picture_over_an_adapter_and_again(
    tiny_folder: Path, image: Path, save_trained_on: Callable[..., Path], capsys: Printed
) -> None:
    adapter = save_trained_on(tiny_folder, {"lora": {"sites": "cross", "rank": 2}})
    told = (f"image={image}", f"source={SOURCE}", f"prompt={PROMPT}", "methods.p2p.null_text=1")
    words = ("recipe=p2p", "steps=3", "guidance=3", f"adapter={adapter}", *told)
    found = made(capsys, *words, "out=one")
    facts = json.loads(found[-1].read_text())
    assert facts["image"] == "fox.png" and len(facts["image_sha256"]) == 16
    assert facts["adapter_sha256"]
    assert main(["edit", f"from={found[-1]}", "out=two"]) == 0
    assert "repeated, bit for bit" in capsys.readouterr().err
    image.write_bytes(image.read_bytes() + b"x")
    assert "fox.png has changed since the edit" in refused(capsys, f"from={found[-1]}")
    image.unlink()
    assert "its image" in (said := refused(capsys, f"from={found[-1]}")) and "not here" in said


def test_a_whole_prompt_in_brackets() -> None:
    """It reads as a list of one text."""
    found = with_recipe({"recipe": "p2p", "prompt": ["a fox->a cat|a dog"]})
    assert (found["source"], found["prompt"]) == ("a fox", ("a cat", "a dog"))


def test_an_edit_again_with_another_option_of_its_method(
    tiny_folder: Path, capsys: Printed
) -> None:
    """The other options stay, whatever words the file's name has; one without effect is refused."""
    words = (f"backbone={tiny_folder}", "steps=2", "prompt=a [fox->cat] -edited by hand")
    found = made(capsys, "recipe=p2p", *words, "methods.p2p={blend: true, self_steps: [0,1]}")
    more = ("out=again", "methods.p2p.threshold=0.9")
    again = json.loads(made(capsys, f"from={found[0]}", *more)[-1].read_text())
    own = again["options"]["methods"]["p2p"]
    assert (own["blend"], own["self_steps"], own["threshold"]) == (True, [0.0, 1.0], 0.9)
    blended = ("methods.p2p.blend=false", "methods.p2p.threshold=0.8")
    assert "methods.p2p.threshold=0.8 has no effect" in refused(
        capsys, f"from={found[-1]}", *blended
    )


REFUSED = [
    (("recipe=p2p", "prompt=a cat"), "methods.p2p edits a source; say what it shows, as in"),
    (("prompt=a [cat->dog]",), "recipe=<name> is missing; recipes of edit: "),
    (("recipe=p2p", "method=p2p"), "give recipe or method, not both"),
    (("recipe=p3p",), "recipe=p3p: there is no such recipe of edit"),
    (("recipe=p2p", "source=a", "prompt=a [cat->dog]"), "both say what the source shows"),
    (
        ("recipe=p2p", "prompt=a [cat->dog|fox] [on->in|by|at]"),
        "brackets with | have as many parts",
    ),
    (("recipe=p2p", "prompt=['a [cat->dog]', 'a [cow->dog]']"), "at once have one source"),
    (("recipe=p2p", "image=no.png"), "image='no.png': no such file; give the path of a PNG"),
    (("recipe=p2p", "target_mask={image}"), "target_mask= is beside mask=, which is of the"),
    (("recipe=p2p", "methods.p2p.cross_steps=[0.5,0.5]"), "methods.p2p.cross_steps=[0.5, 0.5]: an"),
    (
        ("recipe=p2p", "methods.p2p.threshold=0.5", "methods.p2p.blend=false"),
        "has no effect: blend=",
    ),
    (("recipe=infusion", "methods.infusion={steps: null, sites: self}"), ".sites=self has no eff"),
    (("recipe=fec", "methods.fec={steps: null, sites: self}"), "methods.fec.sites=self has no eff"),
    (("recipe=tf_icon", "methods.tf_icon={steps: null, bank_limit: 9}"), "bank_limit=9 has no ef"),
    (("recipe=fam_diffusion", "methods.fam_diffusion={weight: 0, bank_limit: 9}"), "limit=9 has"),
    (
        ("recipe=aid", "methods.aid={steps: null, way: inner}"),
        "methods.aid.way=inner has no effect",
    ),
    (("recipe=p2p", "prompt=[fox->cat, dog]"), "prompt='fox->cat': the arrow -> stands in brack"),
    (("recipe=p2p", "prompt=a fox->cat"), "prompt='a fox->cat': the arrow -> stands in brackets"),
    (("recipe=p2p", "prompt=a [fox->cat"), "the arrow -> stands in brackets around the words"),
    (("recipe=p2p", "stepps=3"), "stepps: no such key; did you mean steps?"),
    (("from={image}",), "there is no JSON of an edit; give the JSON that `edit` wrote"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_refused(
    words: tuple[str, ...], says: str, tiny_folder: Path, image: Path, capsys: Printed
) -> None:
    told = [word.replace("{image}", str(image)) for word in words]
    assert says in refused(capsys, f"backbone={tiny_folder}", *told)


def test_what_does_not_fit_the_model_is_refused(
    tiny_folder: Path, image: Path, capsys: Printed
) -> None:
    words = ("recipe=p2p", f"backbone={tiny_folder}", "steps=3", "methods.p2p.null_text=0")
    told = (f"source={SOURCE}", f"prompt={PROMPT}", f"image={image}")
    masked = ("methods.p2p=null", "methods.masactrl.share=mask")
    shaped = ("methods.p2p=null", "methods.shape_guided={}", "mask=mask20.png")
    composed = ("methods.p2p=null", "methods.tf_icon={}", "mask=mask20.png")
    Image.new("L", (9, 24)).save("mask.png")
    Image.new("RGB", (9, 24)).save("small.png")
    Image.new("L", (32, 24)).save("other.png")
    Image.new("L", (20, 24)).save("mask20.png")
    for more, says in (
        ((*told, "mask=mask.png", *masked), "mask.png: 9x24 pixels, each side must"),
        (
            (*told, "mask=other.png", *masked),
            "other.png is 32x24, and the picture 20x24",
        ),
        (
            (*told, "mask=mask20.png", "target_mask=other.png", *masked),
            "target_mask=other.png is 32x24, and the picture 20x24",
        ),
        ((*told, *shaped, "target_mask=mask20.png"), "target_mask= is not read by methods.shape"),
        ((*told, *composed, "reference=other.png"), "reference=other.png is 32x24, and the pict"),
        ((*told, *composed, "reference=mask20.png"), "methods.tf_icon: the mask has no place that"),
        ((*told[:1], "prompt=[a, b]", "between=2"), "between= is not read by methods.p2p; leave"),
        (
            ("prompt=[a fox, a cat]", "methods.p2p=null", "methods.aid={}"),
            "methods.aid makes pictures between two; give both prompts, and how many",
        ),
        ((*told, "mask=mask20.png"), "mask= is not read by methods.p2p; leave it out"),
        ((*told[:2], "image=small.png"), "small.png: 9x24"),
        ((f"source={SOURCE}", "prompt=a cat"), "to replace words, both need as many"),
        ((*told, "methods.p2p.word_weights={cow: 2}"), "the word 'cow' is not in the prompt"),
        ((*told, "methods.p2p.self_steps=[0.4,0.6]"), "self_steps=[0.4,0.6] has none of 3 steps"),
        ((*told, "size=33"), "size=33"),
        (("prompt=a [fox->cat]", "methods.flash={}"), "methods.flash"),
    ):
        assert says in refused(capsys, *words, *more), more


@pytest.mark.parametrize("name", edit_recipes())
def test_every_recipe_of_edit_is_whole(name: str) -> None:
    """Its header begins with what it is and a command that runs it, its options are those of
    `edit`, and there is a method of its name."""
    path = EDITS / f"{name}.yaml"
    first = f"{commands_in(header_of(path))[0]} "
    assert first.startswith(f"python -m trainer edit recipe={name} ")
    assert name in {own.stem for own in method_files()}
    tree = with_recipe({"recipe": name})
    (method,) = [own for own in methods_of(tree["methods"]).values() if own.name == name]
    assert method.use in ("sample", "optimise")
    assert read_yaml(path)["backbone"]


def test_every_method_that_edits_has_a_recipe() -> None:
    """Those of `sample` alone, as text2video_zero, make clips."""
    with pytest.raises(RecipeError, match=r"recipe=fit: there is no such recipe of edit"):
        with_recipe({"recipe": "fit"})
    assert "p2p" in edit_recipes()
