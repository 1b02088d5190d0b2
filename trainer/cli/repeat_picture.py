"""`sample from=picture.png`, or a clip: the settings in the file of a picture as options, and the
files that it was made with, found again by their names and compared by their hashes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.given_adapter import CHECKPOINTS, given_digest

if TYPE_CHECKING:
    from PIL.Image import Image

# facts that are options as they are
SAME = (
    "prompt", "negative", "seed", "steps", "guidance", "true_guidance", "temporal_guidance", "size",
    "fps", "scheduler", "scale", "strength", "structure_level", "methods", "batch", "before",
    "between", "after", "block", "overlap", "take", "every", "shrink", "reconstruction",
    "corrector", "source_prompt", "reference_scale", "condition_guidance",
)  # fmt: skip
FILES = (
    "source",
    "image",
    "structure",
    "known",
    "reference",
    "reference_mask",
)  # facts that name files, with their hashes
PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class RepeatedPicture:
    """A picture that is made again. given: the options that the user gave over its own."""

    path: Path
    facts: Mapping[str, Any]
    given: frozenset[str]

    @property
    def exactly(self) -> bool:
        """Whether nothing was given that changes the picture."""
        return not self.given - {"out", "sheet", "adapter", "backbone", "null_text", *FILES}

    @property
    def row(self) -> int | None:
        """The row that the picture had in its batch; None where it was alone, or where the batch is
        another."""
        batch, row = self.facts.get("batch"), self.facts.get("row")
        known = isinstance(batch, int) and isinstance(row, int) and 0 <= row < batch
        changed = self.given & {"batch", "count", "prompts", "seed"}
        return row if known and not changed else None


def read_picture(path: Path, given: Mapping[str, Any]) -> tuple[dict[str, Any], RepeatedPicture]:
    """The options of a picture with those given over them.

    Raises:
        ValueError: the file says nothing of what made it, or an adapter, a backbone or another file
            is not found, or has changed since.
    """
    from trainer.media.made_by import facts_in

    found = RepeatedPicture(path, facts_in(path.expanduser()), frozenset(given))
    facts, bare = found.facts, found.facts.get("step") == 0 and "backbone" in given
    if "rows" in facts:
        raise ValueError(
            f"from={path}: a sheet of several pictures; give one of those beside it, as in "
            "previews/step-000300/00-a-fox.png"
        )
    options = {key: facts[key] for key in SAME if key in facts}
    options["frames"] = facts.get("frames", 1)
    options["device"] = facts.get("device", "auto")
    options["precision"] = PRECISION.get(str(facts.get("computes_in")), "auto")
    if given.get("prompts"):
        options.pop("prompt", None)
    if "adapter" in given:
        options = {key: own for key, own in options.items() if key not in ("methods", "scale")}
    elif "adapter" in facts and not bare:
        options["adapter"] = _adapters(found)
    if ("over" in facts or "adapter" not in facts) and not {"adapter", "backbone"} & set(given):
        options["backbone"] = _backbone(found)
    _refuse_unheld(path, facts, given)
    for key in FILES:
        if key in facts and key not in given:
            options[key] = _file(found, key)
    if "null_text" not in given and (own := _beside(found, "null_text")) is not None:
        options["null_text"] = own
    return options | dict(given), found


def _refuse_unheld(path: Path, facts: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError for what came from the data of a run and is not given."""
    if "read_from_data" not in facts or {"structure", "reference"} & set(given):
        return
    read = facts["read_from_data"]
    instead = "reference=<picture>" if "reference" in read else "structure=<clip>"
    raise ValueError(
        f"from={path}: its {' and '.join(map(str, read))} came from the data of its run, which the "
        f"file does not hold; give {instead}"
    )


def compare_parts(picture: RepeatedPicture, parts: Mapping[str, str]) -> None:
    """Compares the parts of the backbone with those the picture was made with.

    Raises:
        ValueError: one has changed, and the user has not named the backbone or adapter anew.
    """
    before = picture.facts.get("backbone_parts")
    if not isinstance(before, dict):
        return
    changed = [name for name in sorted({*before, *parts}) if before.get(name) != parts.get(name)]
    if not changed:
        return
    text = (
        f"from={picture.path}: {', '.join(changed)} of backbone {picture.facts.get('backbone')} "
        f"{'has' if len(changed) == 1 else 'have'} changed since the picture was made"
    )
    if not picture.given & {"adapter", "backbone"}:
        raise ValueError(f"{text}; give backbone=<folder> to use another one")
    print(f"{text}; the one given is used", file=sys.stderr)


def _near(picture: RepeatedPicture, names: list[str]) -> Iterator[Path]:
    """Where a file of the picture's may be: here, among the runs, beside the picture. Names lead to
    nowhere else."""
    beside = picture.path.expanduser().absolute().parent
    for name in names:
        if not Path(name).name or Path(name).is_absolute() or ".." in Path(name).parts:
            continue
        # the last is `runs`, for a preview in runs/<recipe>/<id>/previews/step-000300
        for folder in (Path(), Path("runs"), beside, beside.parent, beside / "../../../.."):
            yield folder / name


def _adapters(picture: RepeatedPicture) -> Any:
    """The paths of the picture's adapters: one, or a list."""
    names, hashes, steps = (picture.facts.get(key) for key in ("adapter", "adapter_sha256", "step"))
    if not isinstance(names, list):
        return str(_adapter(picture, str(names), hashes, step=steps))
    steps = [None] * len(names) if steps is None else steps
    if not all(isinstance(own, list) and len(own) == len(names) for own in (hashes, steps)):
        raise ValueError(f"from={picture.path}: what it says of its adapters is incomplete")
    every = zip(names, list(hashes or []), steps, strict=True)
    return [str(_adapter(picture, str(name), digest, step=step)) for name, digest, step in every]


def _adapter(picture: RepeatedPicture, name: str, digest: Any, *, step: Any) -> Path:
    from trainer.common.paths import shipped
    from trainer.runs.run_folder import kept_adapter, step_name

    finished = [name, f"{name}.safetensors"]
    if not isinstance(step, int):
        places = [*_near(picture, finished), *([] if "/" in name else [shipped(name)])]
        return _same(picture, "adapter", name, digest=digest, places=places, hashed=given_digest)
    if digest is None:
        raise ValueError(f"from={picture.path}: {_not_kept(name, step)}")
    # the last preview of a run names its result, others the adapter that was kept at their step
    kept = str(kept_adapter(Path(name), step))
    for place in _near(picture, [*finished, kept]):
        if given_digest(place) == digest:
            return place
    digest = picture.facts.get("checkpoint_sha256") or digest
    places = list(_near(picture, [f"{name}/{CHECKPOINTS}/{step_name(step)}", kept]))
    return _same(picture, "adapter", name, digest=digest, places=places, hashed=given_digest)


def _not_kept(name: str, step: int) -> str:
    """Why a preview cannot be made again."""
    if step == 0:
        return (
            f"a preview of {name} before its first step, when there was no adapter; give "
            "backbone=<name or folder> for the backbone alone, or adapter=<another>"
        )
    return (
        f"a preview of {name} after step {step}, of which no checkpoint was kept "
        "(run.checkpoint_every); give adapter=<another>"
    )


def _beside(picture: RepeatedPicture, key: str) -> str | None:
    """A file of the picture's that can be made again where it is not here: then None."""
    name, digest = str(picture.facts.get(key)), picture.facts.get(f"{key}_sha256")
    there = (place for place in _near(picture, [name]) if given_digest(place) == digest)
    return None if digest is None else next(map(str, there), None)


def _file(picture: RepeatedPicture, key: str) -> str | list[str]:
    """The file of a key, or the files where it names several."""
    names, digests = picture.facts[key], picture.facts.get(f"{key}_sha256")
    if isinstance(names, list):
        pairs = zip(names, digests if isinstance(digests, list) else [], strict=False)
        return [_one_file(picture, key, str(name), digest=digest) for name, digest in pairs]
    return _one_file(picture, key, str(names), digest=digests)


def _one_file(picture: RepeatedPicture, key: str, name: str, *, digest: Any) -> str:
    places = list(_near(picture, [name]))
    found = _same(picture, key, name, digest=digest, places=places, hashed=given_digest)
    return str(found)


def _same(
    picture: RepeatedPicture,
    key: str,
    name: str,
    *,
    digest: Any,
    places: list[Path],
    hashed: Callable[[Path], str | None],
) -> Path:
    """The first of the places that has the hash."""
    there = {place: own for place in places if (own := hashed(place)) is not None}
    for place, own in there.items():
        if own == digest:
            return place
    if not there:
        raise ValueError(
            f"from={picture.path}: its {key} {name} (sha256 {digest}) is not here; give "
            f"{key}=<where it is>"
        )
    place, own = next(iter(there.items()))
    raise ValueError(
        f"from={picture.path}: its {key} {place} has changed since the picture was made (sha256 "
        f"{digest} then, {own} now); give {key}=<another> to use that instead"
    )


def _backbone(picture: RepeatedPicture) -> str:
    from trainer.config.lineage import backbone_names

    name = str(picture.facts.get("over") or picture.facts.get("backbone"))
    if name in backbone_names():
        return name
    for place in _near(picture, [name]):
        if (place / "model_index.json").is_file() or (place / "adapter.safetensors").is_file():
            return str(place)
    raise ValueError(
        f"from={picture.path}: its backbone {name} is not here; give backbone=<its folder>"
    )


@contextmanager
def as_then(picture: RepeatedPicture | None) -> Iterator[None]:
    """As many threads as the picture was made with: the last bits of sums depend on it."""
    import torch

    threads, before = picture and picture.facts.get("threads"), torch.get_num_threads()
    if not isinstance(threads, int) or not 0 < threads <= 1024:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compared(picture: RepeatedPicture, found: Sequence[Path]) -> str:
    """What to say of a picture or clip that was made again. found: the files of the new one."""
    import torch

    from trainer.media.made_by import is_mp4

    old = picture.path.expanduser()
    kind = ".mp4" if is_mp4(old) else found[-1].suffix
    new = next((path for path in found if path.suffix == kind), found[-1])
    much = _difference(picture, old, new)
    if much is None:
        return f"{picture.path}: repeated, bit for bit"
    then, facts = picture.facts.get("torch"), picture.facts
    return (
        f"{picture.path}: repeated, and differs {much}; it was made with torch {then} on "
        f"{facts.get('device')}, and this is torch {torch.__version__}"
    )


def _difference(picture: RepeatedPicture, old: Path, new: Path) -> str | None:
    """How much two files differ: clips by their frames before these were encoded, where both say
    them. None where they do not."""
    import numpy as np

    from trainer.media.made_by import FRAMES, facts_in

    before = picture.facts.get(FRAMES)
    if before is not None and before == facts_in(new).get(FRAMES):
        return None
    now = _shown(new)
    then = _shown(old, len(now))
    if len(then) != len(now) or then[0].size != now[0].size:
        return "in its size"
    most = max(
        int(np.abs(np.asarray(one).astype(int) - np.asarray(other)).max())
        for one, other in zip(then, now, strict=True)
    )
    if most:
        return f"by up to {most} of 255"
    return None if before is None else "in its frames before encoding, not in what the file shows"


def _shown(path: Path, most: int | None = None) -> list[Image]:
    """The frames in a file, RGB; of an older one no more than one above `most`, and none where
    their number is another."""
    from PIL import ImageSequence
    from PIL.Image import open as open_image

    from trainer.media.made_by import is_mp4
    from trainer.media.read_video import frames_of_video

    if is_mp4(path):
        return frames_of_video(path, None if most is None else most + 1)
    with open_image(path, formats=("PNG", "GIF")) as image:
        if most not in (None, getattr(image, "n_frames", 1)):
            return []
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
