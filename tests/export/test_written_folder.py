"""What holds for the folder of every export: its README's python call runs, its bytes repeat, other
users may read it, and its headers say what it is but not where it was made."""

from __future__ import annotations

import json
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open

from trainer.backbones import load_backbone
from trainer.backbones.families import find_family
from trainer.config.header import read_header
from trainer.config.lineage import backbone_spec
from trainer.export.card import Card, card_of
from trainer.export.export import export
from trainer.export.printed_call import code_of, run_call
from trainer.export.usage import asked_size
from trainer.runs.adapter import load_adapted

# a format, and an adapter of `conftest.TREES` that it carries
CARRIES = {
    "merged": "custom", "diffusers": "lora", "custom_diffusion": "custom", "kohya": "lora",
    "comfyui": "custom", "diff": "dora", "peft": "lora",
}  # fmt: skip
READ_BY_PYTHON = ("merged", "diffusers", "custom_diffusion", "kohya", "peft")


def quiet(line: str) -> None:
    pass


def run_as_printed(out: Path, base: Path) -> dict[str, Any]:
    """Runs the README's call in the export's folder, as a user would, on two steps."""
    code = re.search(r"^```python\n(.*?)^```$", (out / "README.md").read_text(), re.M | re.S)
    assert code is not None
    source = re.sub(r"^base = .*$", f"base = {str(base)!r}", code[1], flags=re.M)
    source = re.sub(r"^steps = .*$", "steps = 2", source, flags=re.M)
    names: dict[str, Any] = {}
    with chdir(out):
        exec(source, names)
    return names


@pytest.fixture(scope="module")
def folder(written: Any) -> Callable[[str], Path]:
    """`folder(name)`: the export in a format, which no test changes."""
    return lambda name: written(CARRIES[name], name)[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", READ_BY_PYTHON)
def test_the_printed_call_makes_a_picture(
    name: str, dtype: str, folder: Any, trained: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "my_dog"
    if dtype == "float32":
        shutil.copytree(folder(name), out)  # the picture is saved beside the files
    else:
        export(trained(CARRIES[name]), out, name, dtype=dtype, say=quiet)
    picture = run_as_printed(out, tiny_folder)["picture"]
    assert picture.size == (32, 32)
    assert any(low != high for low, high in picture.getextrema())
    assert (out / "picture.png").is_file()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_a_merged_folder_runs_plainly_and_in_half_precision(
    stored: str, half: torch.dtype, trained: Any, tmp_path: Path
) -> None:
    """With the call that any diffusers page shows, whatever the files hold."""
    from diffusers import StableDiffusionPipeline

    out = export(trained("custom"), tmp_path / "out", dtype=stored, say=quiet)
    for options, wanted in (({}, torch.float32), ({"dtype": half}, half)):
        pipe = StableDiffusionPipeline.from_pretrained(out, **options)
        assert {pipe.unet.dtype, pipe.text_encoder.dtype, pipe.vae.dtype} == {wanted}
        picture = pipe("a <v1>", num_inference_steps=1, output_type="np").images
        assert picture.std() > 0.01


def test_words_are_loaded_by_the_printed_call(
    folder: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(folder("custom_diffusion"), tmp_path / "out")
    pipe = run_as_printed(out, tiny_folder)["pipe"]
    assert {"<v1>", "sks"} <= set(pipe.tokenizer.get_added_vocab())


def test_words_of_a_pipeline_without_a_loader_for_them(
    dit_folder: Path, save_trained_on: Callable[..., Path], tmp_path: Path
) -> None:
    """PixArt's pipeline has no load_textual_inversion; the call adds the rows itself."""
    tree = {
        "lora": {"sites": "cross", "rank": 2},
        "new_token": {"tokens": ["<v1>"], "init": "fox"},
    }
    path = save_trained_on(dit_folder, tree)
    said: list[str] = []
    out = export(path, tmp_path / "out", "peft", say=said.append)
    assert said[-1].startswith("the call in README.md gives a picture; largest difference")
    pipe = run_as_printed(out, dit_folder)["pipe"]
    assert "<v1>" in pipe.tokenizer.get_added_vocab()


def test_a_transformer_whose_text_encoder_is_short(
    dit_folder: Path, save_trained_on: Callable[..., Path], tmp_path: Path
) -> None:
    """PixArt's pipeline asks for 120 tokens, and this text encoder has 32 positions."""
    path = save_trained_on(dit_folder, {"lora": {"sites": "cross", "rank": 2}})
    out = export(path, tmp_path / "out", say=quiet)
    assert "max_sequence_length=32" in (out / "README.md").read_text()
    assert run_as_printed(out, dit_folder)["picture"].size == (32, 32)


def files(folder: Path) -> dict[Path, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CARRIES)
def test_the_same_export_gives_the_same_bytes(
    name: str, folder: Any, trained: Any, tmp_path: Path
) -> None:
    """safetensors writes the entries of a header in an order that changes from call to call."""
    again = export(trained(CARRIES[name]), tmp_path / "my_dog", name, say=quiet)
    assert files(again) == files(folder(name))


@pytest.mark.parametrize("name", CARRIES)
def test_everybody_may_read_and_nobody_learns_where_it_was_made(
    name: str, folder: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    out = folder(name)
    places = (out.parent, tmp_path.parent, tiny_folder, tiny_folder.parent, Path.home())
    here = [str(part).encode() for part in places]
    for path in (out, *out.rglob("*")):
        wanted = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
        if path.is_file():
            assert not [place for place in here if place in path.read_bytes()], path


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CARRIES)
def test_every_header_says_the_words_and_the_size(
    name: str, tiny_folder: Path, tmp_path: Path, save_trained_on: Callable[..., Path]
) -> None:
    tree = {"methods": {"new_token": {"tokens": ["<v1>"], "init": "fox"}}}
    if name == "diff":
        tree["methods"]["dora"] = {"sites": "cross", "rank": 2}
    else:
        tree["methods"]["selective"] = {"sites": "cross"}
    more = {
        "data": {"source": "concept", "token": "<v1>", "class_word": "cup"},
        "run": {"resolution": 48},
    }
    path = save_trained_on(tiny_folder, tree["methods"], **more)
    out = export(path, tmp_path / "my_cup", name, say=quiet)
    files = list(out.rglob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert header["modelspec.trigger_phrase"] == "<v1> cup", file
        assert header["modelspec.resolution"] == "48x48", file
        assert header["modelspec.title"] == "my_cup", file
    readme = (out / "README.md").read_text()
    assert "`<v1>`" in readme and "48x48" in readme
    if name in READ_BY_PYTHON:
        assert "width=48, height=48" in readme
    if name == "kohya":
        with safe_open(out / "my_cup.safetensors", "pt") as opened:
            assert opened.metadata()["ss_resolution"] == "(48, 48)"


@pytest.mark.parametrize(("family", "sides"), [("sd", (104, 48)), ("sana", (96, 32))])
def test_the_call_asks_for_sides_that_stock_pipelines_take(
    family: str, sides: tuple[int, int]
) -> None:
    base = SimpleNamespace(declared=find_family(family))
    assert asked_size((102, 44), base) == sides and asked_size((4, 64), base)[1] == 64
    assert asked_size((4, 4), base)[0] == base.declared.stock_multiple


def test_a_size_that_no_stock_pipeline_takes_can_be_exported(
    tiny_folder: Path, tmp_path: Path, save_trained_on: Callable[..., Path]
) -> None:
    """The VAE of the embedded world has 4 pixels a latent, and diffusers takes multiples of 8."""
    methods = {"lora": {"sites": "cross", "rank": 2}}
    path = save_trained_on(tiny_folder, methods, run={"resolution": 44})
    out = export(path, tmp_path / "mine", "diffusers", say=quiet)
    readme = (out / "README.md").read_text()
    assert "Trained at 44x44 pixels; the call below asks for the nearest" in readme
    assert "width=48, height=48" in readme


LONG = "a fox on a blue background " * 8  # more than the 30 tokens of one call


@pytest.mark.parametrize(("name", "kind"), [("kohya", "tiny"), ("peft", "dit"), ("comfyui", "dit")])
def test_long_prompts_are_said_and_read_by_the_printed_call(
    name: str, kind: str, request: pytest.FixtureRequest, save_trained_on: Any, tmp_path: Path
) -> None:
    base: Path = request.getfixturevalue(f"{kind}_folder")
    methods = {"lora": {"sites": "cross", "rank": 2}}
    path = save_trained_on(base, methods, text={"max_tokens": 60})
    out = export(path, tmp_path / "mine", name, say=quiet)
    hint = (
        "Trained with prompts of up to 60 tokens, in parts of 30 that have a begin and an end each"
    )
    for file in out.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        assert header["ss_max_token_length"] == "60"
        assert header["modelspec.usage_hint"] == hint
    readme = " ".join((out / "README.md").read_text().split())
    assert f"{hint}. A1111's web UI, Forge and ComfyUI read long prompts so" in readme
    assert ("The call below reads them so." in readme) == (name != "comfyui")
    if name == "comfyui":
        return
    names = run_as_printed(out, _plain(base, tmp_path))
    adapted, _ = load_adapted(path)
    for prompt in (LONG, "a fox", ""):
        wanted = adapted.encode_prompts([prompt])
        found = names["encode"](prompt)
        tokens, mask = (found, None) if kind == "tiny" else found
        torch.testing.assert_close(tokens, wanted.tokens, rtol=0, atol=1e-5)
        assert tokens.shape[1] == 64
        assert mask is None or torch.equal(mask, wanted.mask.to(mask.dtype))


def _plain(base: Path, tmp_path: Path) -> Path:
    """The backbone as a stock pipeline's folder."""
    load_backbone(backbone_spec(str(base)), str(base)).pipeline().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_short_reader_is_called_as_ever(folder: Any) -> None:
    """Without text.max_tokens nothing is said of the length of prompts."""
    readme = (folder("kohya") / "README.md").read_text()
    assert "encode" not in readme and "Trained with prompts" not in readme
    with safe_open(folder("kohya") / "my_dog.safetensors", "pt") as opened:
        assert "ss_max_token_length" not in opened.metadata()


def test_a_word_from_a_strangers_file_is_never_code(tiny_folder: Path, tiny: Any) -> None:
    evil = "x\n```python\nraise SystemExit\n```\n"
    tree = {"backbone": str(tiny_folder), "methods": {"lora": {}}, "data": {"token": evil}}
    card = card_of("title", tree, tiny, words=[])
    assert "\n" not in card.phrase
    assert not any("\n" in word for word in card.trained)


@pytest.mark.parametrize("token", [{}, {"token": "<v1>"}, {"token": ["<v1>"]}], ids=str)
def test_the_class_word_follows_a_token_of_any_spelling(
    token: dict[str, Any], tiny_folder: Path, tiny: Any
) -> None:
    """A recipe that leaves `data.token` out has `<v1>`."""
    data = {"source": "concept", "class_word": "dog", **token}
    tree = {"backbone": str(tiny_folder), "methods": {"lora": {}}, "data": data}
    assert card_of("title", tree, tiny, words=["<v1>"]).phrase == "<v1> dog"
    assert card_of("title", tree, tiny, words=["<v2>"]).phrase == "<v2>"


def test_a_folder_is_named_without_its_path() -> None:
    assert Card(backbone="x").entries.keys() == {"modelspec.sai_model_spec"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "README prints fails: ZeroDivisionError: division by zero"),
        ("from PIL import Image\npicture = Image.new('RGB', (2, 2))", "picture of one colour"),
    ],
)
def test_a_call_that_makes_no_picture_is_refused(code: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_call(code, {})


def test_settings_are_all_that_the_proof_changes(folder: Any) -> None:
    code = code_of(folder("kohya"))
    assert code is not None
    assert [line.partition(" = ")[0] for line in code.splitlines() if " = " in line][:5] == [
        "folder", "base", "device", "steps", "dtype"
    ]  # fmt: skip


def test_a_merged_folder_has_the_files_of_older_versions(folder: Any) -> None:
    """transformers 4 reads vocab.json and merges.txt, and the names with the level text_model."""
    out = folder("merged")
    fast = json.loads((out / "tokenizer" / "tokenizer.json").read_text())["model"]
    assert json.loads((out / "tokenizer" / "vocab.json").read_text()) == fast["vocab"]
    first, *pairs = (out / "tokenizer" / "merges.txt").read_text().splitlines()
    assert first.startswith("#version")
    assert [tuple(pair.split(" ")) for pair in pairs] == [tuple(pair) for pair in fast["merges"]]
    with safe_open(out / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


def test_the_recipe_is_not_changed_by_the_export(trained: Any, tmp_path: Path) -> None:
    before = read_header(trained("lora"))
    export(trained("lora"), tmp_path / "out", "kohya", say=quiet)
    assert read_header(trained("lora")) == before
