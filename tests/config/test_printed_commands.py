"""The commands that pages and the headers of recipes print: each `fit` is a recipe that resolves,
with folders of the names it has."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from trainer.config.load import load_recipe

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "recipes/*.yaml", "data/*/README.md")
BEGIN = "python -m trainer fit "
PHOTOS = ("my_dog", "my_cat", "dog", "cup", "pictures", "dogs", "cups")
CLIPS = ("clip", "skiing")  # files called so, .mp4
# of things that a reader has, and which are long to make here
ELSEWHERE = ("./model.safetensors", "./dataset", "./wide", "'./shards", "./latents")


def printed() -> Iterator[str]:
    """The words behind `fit`, line ends joined, comments left out."""
    for path in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        text = re.sub(r"\\\n[# ]*", "", path.read_text(encoding="utf-8"))
        for line in text.splitlines():
            if BEGIN in line:
                yield line.partition(BEGIN)[2].partition("`")[0].partition("  #")[0].strip()


def whole(command: str) -> bool:
    """Whether it names neither a placeholder, as <id>, nor what is only elsewhere."""
    placeholder = re.search(r"<(?!v\d|new)|\.\.\.", command)
    return placeholder is None and not any(f"={name}" in command for name in ELSEWHERE)


COMMANDS = sorted({command for command in printed() if whole(command)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("av")
    from trainer.media.write_video import write_frames

    folder = tmp_path_factory.mktemp("printed")
    photo = Image.effect_noise((600, 600), 80).convert("RGB")
    for name in PHOTOS:
        (folder / name).mkdir()
        for number in range(6):
            photo.save(folder / name / f"{number}.jpg")
            (folder / name / f"{number}.txt").write_text("a <v1> dog, a <v2> cat")
    (folder / "clips").mkdir()
    grey = [Image.new("RGB", (64, 64), (shade, shade, shade)) for shade in range(120)]
    for name in (*CLIPS, "clips/0", "clips/1"):
        _, gif = write_frames(grey, folder / name, 8)
        gif.unlink()
        (folder / f"{name}.txt").write_text("a man skiing")
    return folder


@pytest.mark.sampled(12)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_is_a_recipe(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert load_recipe(shlex.split(command)).methods


def test_there_are_commands_in_pages_and_in_headers() -> None:
    assert len(COMMANDS) > 80
    assert {"recipe=custom_diffusion", "recipe=lora"} <= set(COMMANDS)
