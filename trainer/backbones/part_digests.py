"""What a backbone was made of, as a short hash of each part's files: a picture says it, so that a
part that has changed since can be named. No torch."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

from trainer.backbones.families import find_family
from trainer.backbones.spec import BackboneSpec
from trainer.backbones.weight_files import weight_files
from trainer.common.atomic import written_atomically
from trainer.common.left_by_systems import left_by_system
from trainer.common.paths import cache_folder

SMALL = (".json", ".txt", ".model")  # what a part has beside its weights
LENGTH = 16  # letters of a hash that are kept


def part_digests(spec: BackboneSpec) -> dict[str, str]:
    """The hash of each part of a backbone by the part's name, and of the adapters of the runs it is
    the result of. A checkpoint of the hub is its pinned commit."""
    return _digests(spec, _folders(spec))


def digests_in_use(spec: BackboneSpec) -> dict[str, str]:
    """Those of `part_digests` on which training depends: a folder may hold a safety checker too,
    which is not read."""
    family = find_family(spec.family)
    own = (family.denoiser, *family.vae_parts, "scheduler", "text_encoder", "tokenizer")
    return _digests(spec, [part for part in _folders(spec) if part.name.startswith(own)])


def _digests(spec: BackboneSpec, folders: Sequence[Path]) -> dict[str, str]:
    """folders: of the parts of the pipeline folder that are hashed."""
    found: dict[str, str] = {}
    if spec.hub is not None:
        found["hub"] = f"{spec.hub}@{spec.revision}"
    # a part of the overlay replaces that of the folder
    found |= {part.name: digest for part in folders if (digest := _of_part(part))}
    for part, folder in spec.parts.items():
        if digest := _of_part(Path(folder)):
            found[part] = digest
    if spec.file is not None:
        found["file"] = file_digest(Path(spec.file))
    if spec.denoiser is not None or spec.scratch:
        made = spec.model_dump_json(include={"denoiser", "scratch", "family"})
        found["made from nothing"] = hashlib.sha256(made.encode()).hexdigest()[:LENGTH]
    for number, adapter in enumerate(spec.adapters, start=1):
        found[f"adapter {number}"] = file_digest(Path(adapter))
    return found


def _folders(spec: BackboneSpec) -> list[Path]:
    """The folders of parts, those of the overlay last."""
    roots = [Path(folder) for folder in (spec.folder, spec.overlay) if folder is not None]
    return [part for root in roots for part in sorted(root.iterdir()) if part.is_dir()]


def _of_part(where: Path) -> str | None:
    """Of the small files of a part and the weights that are read; None where there are none."""
    own = [path for path in where.iterdir() if path.is_file() and not left_by_system(path.name)]
    files = [path for path in own if path.suffix in SMALL]
    if any(path.suffix == ".safetensors" for path in own):
        files += weight_files(where).files
    if not files:
        return None
    lines = [f"{path.name} {file_digest(path)}" for path in sorted(set(files))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:LENGTH]


def file_digest(path: Path) -> str:
    """The first letters of a file's sha256. That of a file whose size and time of change are as
    they were is read from the cache, since weights are large; what is damaged there, or was written
    for another file, is computed anew."""
    facts = path.stat()
    key = f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ino}"
    kept = cache_folder() / "digests" / hashlib.sha256(key.encode()).hexdigest()[:32]
    if kept.is_file():
        known = kept.read_bytes()
        digest = known[:LENGTH].decode("ascii", "replace")
        if known == _kept(digest, key):
            return digest
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:LENGTH]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(kept) as part:
        part.write_bytes(_kept(digest, key))
    return digest


def _kept(digest: str, key: str) -> bytes:
    """A digest as the cache has it: behind it a checksum of it and of what it is kept for."""
    return f"{digest} {zlib.crc32(f'{digest} {key}'.encode()):08x}".encode()
