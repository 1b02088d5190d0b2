"""Where an export is written, and how its file is called, through the real command."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from trainer.__main__ import main
from trainer.export.find_format import find_format, format_names
from trainer.export.out_path import check_out, run_name, settle_out

Printed = pytest.CaptureFixture[str]
ONE_FILE = ("comfyui", "custom_diffusion", "diff", "diffusers", "kohya")


def run_of(adapter: Path, folder: Path) -> Path:
    """A run folder of this name with the adapter in it."""
    folder.mkdir(parents=True)
    shutil.copy(adapter, folder / "adapter.safetensors")
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def my_dog(trained: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The finished run of that name, in the folder where commands are run."""
    monkeypatch.chdir(tmp_path)
    return run_of(trained("text"), Path("runs/lora/my_dog"))


def test_without_out_it_is_named_by_the_run(my_dog: Path, capsys: Printed) -> None:
    assert main(["export", f"run={my_dog}", "format=kohya"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "my_dog-kohya"
    assert files(Path("my_dog-kohya")) == ["README.md", "my_dog.safetensors"]


def test_in_a_new_folder_it_is_named_by_the_run(my_dog: Path) -> None:
    assert main(["export", f"run={my_dog}", "format=comfyui", "out=for_ui"]) == 0
    assert files(Path("for_ui")) == ["README.md", "my_dog.safetensors"]


def test_in_a_folder_that_is_there_it_is_a_file_named_by_the_run(
    my_dog: Path, capsys: Printed
) -> None:
    loras = Path("loras")
    loras.mkdir()
    (loras / "other.safetensors").write_text("keep")
    words = ["export", f"run={my_dog}", "format=comfyui", "out=loras"]
    assert main(words) == 0
    assert files(loras) == ["my_dog.safetensors", "other.safetensors"]
    written = (loras / "my_dog.safetensors").read_bytes()
    capsys.readouterr()
    assert main(words) == 78
    wanted = "error: out=loras/my_dog.safetensors exists; give one that does not, nothing is "
    assert capsys.readouterr().err == f"{wanted}overwritten\n"
    assert (loras / "my_dog.safetensors").read_bytes() == written
    assert (loras / "other.safetensors").read_text() == "keep"
    assert len(list(loras.iterdir())) == 2  # no part of an export that was refused


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_a_file_is_that_file(form: str, my_dog: Path, capsys: Printed) -> None:
    """The same tensors as in a folder; the header is called as the file."""
    assert main(["export", f"run={my_dog}", f"format={form}", "out=./here/max.safetensors"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "here/max.safetensors"
    assert files(Path("here")) == ["max.safetensors"]
    assert main(["export", f"run={my_dog}", f"format={form}", "out=folder"]) == 0
    (other,) = Path("folder").glob("*.safetensors")
    with safe_open("here/max.safetensors", "pt") as one, safe_open(other, "pt") as two:
        assert one.metadata()["modelspec.title"] == "max"
        assert two.metadata()["modelspec.title"] == "my_dog"
        assert set(one.keys()) == set(two.keys())
        assert all(one.get_tensor(key).equal(two.get_tensor(key)) for key in one.keys())  # noqa: SIM118


def test_a_file_of_ours_is_called_as_it_is(my_dog: Path) -> None:
    shutil.copy(my_dog / "adapter.safetensors", "cat.safetensors")
    assert main(["export", "adapter=cat.safetensors", "format=kohya"]) == 0
    assert files(Path("cat-kohya")) == ["README.md", "cat.safetensors"]


def test_words_beside_the_file_need_a_folder(
    trained: Callable[[str], Path], tmp_path: Path, capsys: Printed
) -> None:
    out = tmp_path / "x.safetensors"
    words = ["export", f"adapter={trained('custom')}", "format=comfyui", f"out={out}"]
    assert main(words) == 78
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: out={out} is one file, and this adapter takes several: ")
    assert "embeddings/" in said
    assert said.endswith(f"give a folder, as in out={tmp_path / 'x'}")
    assert not out.exists()
    assert not list(tmp_path.glob(".x*"))


@pytest.mark.parametrize("form", [name for name in format_names() if name not in ONE_FILE])
def test_formats_of_several_files_need_a_folder(form: str, my_dog: Path, capsys: Printed) -> None:
    assert main(["export", f"run={my_dog}", f"format={form}", "out=a/b.safetensors"]) == 78
    assert capsys.readouterr().err == (
        f"error: out=a/b.safetensors is one file, and format={form} has several; give a folder, as "
        f"in out=a/b, or a format of one file: {', '.join(ONE_FILE)}\n"
    )
    assert not Path("a").exists()


def test_which_formats_are_one_file() -> None:
    assert tuple(name for name in format_names() if find_format(name).one_file) == ONE_FILE


def test_a_folder_of_several_files_is_never_mixed_with_another(
    my_dog: Path, capsys: Printed
) -> None:
    Path("full").mkdir()
    assert main(["export", f"run={my_dog}", "out=full"]) == 78
    assert "out=full exists; give one that does not" in capsys.readouterr().err
    assert not files(Path("full"))


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.bin"])
def test_pickles_are_not_written(name: str) -> None:
    with pytest.raises(ValueError, match=r"only safetensors files .* give out=a.safetensors, or"):
        check_out(Path(name), "kohya")


@pytest.mark.parametrize(
    ("place", "recipe", "name"),
    [
        ("runs/lora/my_dog/adapter.safetensors", "lora", "my_dog"),
        ("runs/lora/20261130-174500/adapter.safetensors", "lora", "lora-20261130-174500"),
        ("x/20261130-174500/adapter.safetensors", "./mine.yaml", "mine-20261130-174500"),
        ("runs/c_lora/zoo/task-1/adapter.safetensors", "c_lora", "zoo-task-1"),
        ("max.safetensors", "lora", "max"),
    ],
)
def test_name_of_a_run(place: str, recipe: str, name: str) -> None:
    assert run_name(Path(place), recipe) == name


def test_a_folder_that_was_named_says_more_than_the_time() -> None:
    timed = Path("runs/lora/20261130-174500/adapter.safetensors")
    own = Path("runs/lora/my_dog/adapter.safetensors")
    new = Path("./new_folder")
    assert settle_out(new, timed, "lora", format_name="kohya") == (new, "new_folder")
    assert settle_out(new, own, "lora", format_name="kohya") == (new, "my_dog")
    made = settle_out(None, timed, "lora", format_name="peft")
    assert made == (Path("lora-20261130-174500-peft"), "lora-20261130-174500")
