"""What every part of bench/faults.py shares: a row of its table, its pictures, what is left of a
run."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from _common import Bars
from _faulty import Ended, Place

SHM = Path("/dev/shm")
HANG = 40.0  # seconds after which a run that should have ended counts as hung


@dataclass(frozen=True)
class Row:
    """One fault and what each column made of it; `-`: not asked of it."""

    fault: str
    ours: str
    lightning: str
    accelerate: str = "-"


Part = Callable[[Bars, Place, bool], list[Row]]


def expect(ended: Ended, *codes: int | None) -> Ended:
    """A run that is no fault itself must end as it should, or nothing after it means anything."""
    if ended.code not in codes:
        raise SystemExit(
            f"a run that should end with {codes}: {ended.text()}\n{ended.said[-3000:]}"
        )
    return ended


def of(part: int, whole: int) -> str:
    return f"{part} of {whole}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(name.replace("_", " ") for name in names) or "none"


def unlike(place: Place, one: Path, other: Path) -> dict[int, list[str]]:
    """What the checkpoints of two runs of ours do not share, by step."""
    looked = place.faults
    pairs = zip(looked.checkpoints(one), looked.checkpoints(other), strict=True)
    return {a.step: looked.differing(a, b) for a, b in pairs}


def finite(tensors: Mapping[str, torch.Tensor]) -> float:
    """The share of values that are finite."""
    flat = torch.cat([value.flatten().float() for value in tensors.values()])
    return float(torch.isfinite(flat).float().mean())


def lightning_weights(path: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(path, weights_only=False)["state_dict"]
    return weights


def whole_file(path: Path) -> bool:
    """Whether torch reads a checkpoint of Lightning."""
    try:
        torch.load(path, weights_only=False)
    except Exception:  # whatever a damaged file makes of it
        return False
    return True


def step_names(folder: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in folder.glob("checkpoints/step-??????")}


def logged(folder: Path, steps: int = 1) -> bool:
    """Whether a run of ours has logged so many losses."""
    with suppress(OSError):
        return (folder / "metrics.jsonl").read_text().count("train/loss") >= steps
    return False


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def pictures(place: Place) -> Path:
    """42 scenes with their captions, as files."""
    from trainer.data.tars.write_shards import write_world

    folder = place.folder / "pictures"
    if not folder.exists():
        world = place.folder / "world"
        write_world(world, 42, seed=3, per_shard=11)
        folder.mkdir()
        for path in sorted(world.glob("*.tar")):
            with tarfile.open(path) as archive:
                for info in archive:
                    stem, _, extension = info.name.partition(".")
                    if extension in ("png", "txt"):
                        data = archive.extractfile(info)
                        assert data is not None
                        (folder / f"{stem}.{extension}").write_bytes(data.read())
    return folder


def world(place: Place) -> Path:
    pictures(place)
    return place.folder / "world"


def sound(place: Place, folder: Path) -> bool:
    """Whether every checkpoint under its name verifies."""
    from trainer.training.checkpoint_files import DamagedError

    try:
        place.faults.checkpoints(folder)
    except DamagedError:
        return False
    return True
