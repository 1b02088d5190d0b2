"""Where an export is written: a folder, or, of a format of one file, the very file that is named;
and what it is called where nothing else is said."""

from __future__ import annotations

import re
from pathlib import Path

from trainer.common.paths import bare_name
from trainer.export.find_format import find_format, format_names
from trainer.export.usage import README

SUFFIX = ".safetensors"
OTHER_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
TIME = re.compile(r"\d{8}-\d{6}")  # the name of a run that was given none
TASK = re.compile(r"task-\d+")  # of a concept in a continual run


def run_name(path: Path, recipe: str) -> str:
    """What to call an adapter: by its run, or by its own file where that has a name. A run that has
    the time for a name is called by its recipe too."""
    if path.stem != "adapter":
        return path.stem
    folder = path.absolute().parent
    if TASK.fullmatch(folder.name):
        return f"{run_name(folder.parent / path.name, recipe)}-{folder.name}"
    return f"{recipe_stem(recipe)}-{folder.name}" if is_timed(path) else folder.name


def is_timed(path: Path) -> bool:
    """Whether the adapter is that of a run whose name was made from the time."""
    return path.stem == "adapter" and bool(TIME.fullmatch(path.absolute().parent.name))


def recipe_stem(recipe: str) -> str:
    """A recipe's name, also of one that was given as a file."""
    return Path(bare_name(recipe)).stem


def settle_out(out: Path | None, path: Path, recipe: str, *, format_name: str) -> tuple[Path, str]:
    """Where the export of the adapter in `path` goes, and what its files are called.

    out: as the user gave it. A folder that is there takes a file called as the run, where the
    format is one file; without `out` a new folder is made here.
    """
    name = run_name(path, recipe)
    if out is None:
        return Path(f"{name}-{format_name}"), name
    if out.is_dir() and find_format(format_name).one_file:
        return out / f"{name}{SUFFIX}", name
    # a new folder's name, which a user has thought of, says more than the time
    return out, out.name if is_timed(path) else name


def is_one_file(out: Path) -> bool:
    """Whether an export is to be this file, and not a folder."""
    return out.suffix == SUFFIX


def check_out(out: Path, format_name: str) -> None:
    """Refuses a place that is taken, and a file where a folder is needed.

    Raises:
        ValueError: the message says what to give.
    """
    if out.exists():
        raise ValueError(f"out={out} exists; give one that does not, nothing is overwritten")
    if out.suffix in OTHER_SUFFIXES:
        raise ValueError(
            f"out={out}: only safetensors files are written; give out={out.with_suffix(SUFFIX)}, "
            f"or a folder, as in out={out.with_suffix('')}"
        )
    if is_one_file(out) and not find_format(format_name).one_file:
        others = [name for name in format_names() if find_format(name).one_file]
        raise ValueError(
            f"out={out} is one file, and format={format_name} has several; give a folder, as in "
            f"out={out.with_suffix('')}, or a format of one file: {', '.join(others)}"
        )


def only_file(folder: Path, out: Path) -> Path:
    """The one file of a written folder, apart from its README.

    Raises:
        ValueError: there are more, as the words of the adapter.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != README)
    if len(files) == 1:
        return files[0]
    names = ", ".join(str(path.relative_to(folder)) for path in files)
    raise ValueError(
        f"out={out} is one file, and this adapter takes several: {names}; give a folder, as in "
        f"out={out.with_suffix('')}"
    )
