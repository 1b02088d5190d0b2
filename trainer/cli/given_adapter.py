"""What `adapter=` names: an adapter of ours, a run that has not finished, a checkpoint of one, or
the file of another tool. Each becomes an adapter file, and facts for the pictures made with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.common.adapter_header import HEADER
from trainer.common.paths import cache_folder, shipped
from trainer.config.header import file_of
from trainer.data.identity import LETTERS, sha256_of_file
from trainer.data.kept_file import kept_file

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.backbones.device import Placement
    from trainer.methods.method import Method

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
Say = Callable[[str], None]
Strength = float | dict[str, float]  # of an adapter, or by the names of its methods


@dataclass(frozen=True)
class GivenAdapter:
    """file: an adapter of ours; facts: its name and the hash of what was given, and the step of a
    checkpoint."""

    file: Path
    facts: dict[str, Any] = field(default_factory=dict)


def given_adapter(name: Path, backbone: str | None, say: Say) -> GivenAdapter:
    """The adapter that a user's word names. backbone: what the user has given for it; say: receives
    a line about what is used.

    Raises:
        ValueError: there is no such adapter, the run has no checkpoint yet, or the file of another
            tool cannot be read, or is given without a backbone.
    """
    from trainer.runs.adapter import adapter_facts
    from trainer.runs.run_folder import later_checkpoint

    where = shipped(name)
    file = file_of(name)
    if where.is_dir() and not file.is_file():
        if (where / MANIFEST).is_file():
            return _checkpoint(where, say)
        if (where / CHECKPOINTS).is_dir() or (where / "recipe.yaml").is_file():
            return _unfinished(where, say)
        if any(where.iterdir()):
            return _foreign(where, backbone, say)
    if file.is_file() and not _is_ours(file):
        return _foreign(file, backbone, say)
    if (later := later_checkpoint(file)) is not None:
        say(later)
    return GivenAdapter(file, adapter_facts(file) if file.is_file() else {})


def numbers_only(scale: Any) -> Any:
    """What a user gives as scale; ValueError where it holds something else than numbers."""
    own = scale if isinstance(scale, list | tuple) else [scale]
    every = [x for one in own for x in (one.values() if isinstance(one, Mapping) else [one])]
    if not all(isinstance(x, int | float) for x in every):
        raise ValueError(
            "give a number, as in scale=0.5; one for a method, as in scale.lora=0.5; or one for "
            "each adapter, as in scale=[0.8,0.5]"
        )
    return scale


def load_given(
    given: Sequence[GivenAdapter],
    scales: Sequence[Strength],
    backbone: str | None,
    *,
    placement: Placement,
    methods: Mapping[str, Any],
) -> tuple[Backbone, dict[str, Any]]:
    """The model of one adapter or of several, placed, and the recipe of the first. methods: for
    sampling, beside one adapter, see `load_adapted`."""
    from trainer.runs.adapter import load_adapted
    from trainer.runs.sum_adapters import load_summed

    files = [own.file for own in given]
    if len(files) == 1:
        return load_adapted(files[0], backbone, placement, scale=scales[0], sampling=methods)
    return load_summed(files, _numbers(scales), backbone, placement=placement)


def _numbers(scales: Sequence[Strength]) -> list[float]:
    """Those of several adapters, whose changes are added as wholes."""
    found = [scale for scale in scales if not isinstance(scale, dict)]
    if len(found) < len(scales):
        raise ValueError(
            "scale.<method> is for one adapter; of several, give a number for each, as in "
            "scale=[0.8,0.5]"
        )
    return found


def load_bare(name: str, chosen: Mapping[str, Method], placement: Placement) -> Backbone:
    """A backbone without an adapter, placed, with methods that train nothing."""
    from trainer.backbones.device import place
    from trainer.config.lineage import backbone_spec
    from trainer.methods.apply import apply_methods
    from trainer.runs.adapter import load_base

    backbone = load_base(backbone_spec(name), name, placement, hold=not chosen, read_held=True)
    if chosen:
        apply_methods(backbone, chosen, trains=False)
        place(backbone, placement)
    return backbone


def parts_of(given: Sequence[GivenAdapter], backbone: str | None) -> dict[str, str]:
    """The hashes of the parts of the backbone that adapters, or a user's word, name."""
    from trainer.backbones.part_digests import part_digests
    from trainer.config import lineage
    from trainer.config.header import read_header

    if given:
        return part_digests(lineage.spec_of(read_header(given[0].file)[0], backbone))
    assert backbone is not None
    return part_digests(lineage.backbone_spec(backbone))


def facts_of_given(given: Sequence[GivenAdapter], scales: Sequence[Strength]) -> dict[str, Any]:
    """What a picture says of its adapters: of several a list for each fact."""
    if not given:
        return {}
    if len(given) == 1:
        return given[0].facts | ({"scale": scales[0]} if scales[0] != 1 else {})
    every = [own.facts for own in given]
    keys = [
        key for key in ("adapter", "adapter_sha256", "step") if any(key in own for own in every)
    ]
    return {key: [own.get(key) for own in every] for key in keys} | {"scale": list(scales)}


def _is_ours(file: Path) -> bool:
    """Whether a file is an adapter of ours, or none that another tool's reader would take; what is
    wrong with it is said when its header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            return HEADER in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return True


def _unfinished(run: Path, say: Say) -> GivenAdapter:
    from trainer.training.checkpoint_files import newest_checkpoint

    found = newest_checkpoint(run / CHECKPOINTS, say)
    if found is None:
        raise ValueError(
            f"adapter={run}: the run has not finished, and has no checkpoint yet; it writes one "
            "every run.checkpoint_every steps"
        )
    return _checkpoint(found.folder, say)


def _checkpoint(folder: Path, say: Say) -> GivenAdapter:
    """An adapter of a checkpoint's weights, or their average where the run keeps one, as the run's
    own adapter would be."""
    from trainer.runs.adapter import save_adapter
    from trainer.training.checkpoint_files import DamagedError, read_checkpoint, verified
    from trainer.training.optimizer_packages import stored_average

    try:
        found = verified(folder)
    except DamagedError as error:
        raise ValueError(f"adapter={folder} is damaged: {error}; give another checkpoint") from None
    manifest, run = found.manifest, folder.absolute().parent.parent
    digest = _digest(folder / MANIFEST)  # it holds the hashes of the checkpoint's files
    file = cache_folder() / "checkpoints" / digest / "adapter.safetensors"

    def make(file: Path) -> None:
        weights, state = read_checkpoint(found)
        weights |= (state["parts"].get("ema") or {}).get("averaged", {})
        weights |= stored_average(weights, state.get("optimizer") or {}, state.get("order") or ())
        save_adapter(file, weights, manifest["recipe"], identity=manifest["backbone"])

    kept_file(file, make, say)
    say(f"adapter={folder}: a run that has not finished, its weights after step {found.step}")
    name = f"{run.parent.name}/{run.name}"
    return GivenAdapter(file, {"adapter": name, "adapter_sha256": digest, "step": found.step})


def _foreign(path: Path, backbone: str | None, say: Say) -> GivenAdapter:
    """The file of another tool, imported once into the cache, where it is found again."""
    from trainer.backbones.part_digests import part_digests
    from trainer.common.version import own_version
    from trainer.config.lineage import backbone_spec
    from trainer.export.import_ import import_file

    if backbone is None:
        raise ValueError(
            f"adapter={path}: its header has no {HEADER!r}, so it is not an adapter of ours; if "
            "another tool made it, give the backbone it was made for too, as in backbone=sd15"
        )
    digest = _digest(path)
    # what is read depends on the weights of the backbone, too, as where an adapter starts from them
    base = sorted(part_digests(backbone_spec(backbone)).items())
    key = hashlib.sha256(repr((digest, backbone, base, own_version())).encode()).hexdigest()[:24]
    file = cache_folder() / "imported" / key / "adapter.safetensors"

    def make(file: Path) -> None:
        for line in _imported(import_file, path, backbone, file=file):
            say(line)

    kept_file(file, make, say)
    return GivenAdapter(file, {"adapter": path.stem, "adapter_sha256": digest})


def _imported(import_file: Any, path: Path, backbone: str, *, file: Path) -> list[str]:
    """Imports a file; what was said of it, without how to train on."""
    lines: list[str] = []
    import_file(path, backbone, file, say=lines.append)
    return [line for line in lines if not line.startswith("to start from it")]


def given_digest(path: Path) -> str | None:
    """The hash that a picture names an adapter, or another file, by; None where there is none."""
    if (path / MANIFEST).is_file():
        return _digest(path / MANIFEST)
    found = file_of(path)
    if found.is_file():
        return _digest(found)
    ours = any(path.glob("*.safetensors")) or any(path.glob("*/adapter_config.json"))
    return _digest(path) if path.is_dir() and ours else None


def _digest(path: Path) -> str:
    """Of a file, or of all files of a folder."""
    if path.is_file():
        return sha256_of_file(path)[:LETTERS]
    files = sorted(item for item in path.rglob("*") if item.is_file())
    lines = [f"{item.relative_to(path)} {_digest(item)}" for item in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:LETTERS]
