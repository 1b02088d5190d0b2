"""Files on a disk or on a server, through fsspec: what there is, and a file that is read by ranges.

A request that fails, is cut or takes too long is repeated; nothing is left open between requests,
so a connection that breaks costs one block. What stays wrong is one sentence with the address.
"""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from trainer.common.left_by_systems import own_files
from trainer.data.source import NoAnswerError

TRIES, WAIT, TIMEOUT = 4, 0.5, 60.0  # seconds; the wait doubles
BLOCK, BLOCKS = 4 * 2**20, 2  # bytes of a request; how many are kept
# HTTP codes of a busy server; any other from 400 to 499 is final
RETRIED = frozenset((408, 425, 429))
EXTRAS = {"s3": "pip install 'attention-trainer[s3]'", "gs": "pip install 'attention-trainer[gs]'"}

T = TypeVar("T")


class RefusedError(ValueError):
    """A server does not let this user read a file."""


@dataclass(frozen=True)
class ShardFile:
    """A shard: its size in bytes, and what changes when its bytes do, as far as that is known.
    marks: where every so many-th sample begins, as far as that was found out."""

    address: str
    size: int
    tag: str
    marks: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]


def is_local(address: str) -> bool:
    return "://" not in address


def local_path(address: str) -> Path:
    return Path(address).expanduser()


def shard_file(address: str) -> ShardFile:
    """Size and tag of a file.

    Raises:
        ValueError: there is none, or it may not be read.
        NoAnswerError: the server gives no answer.
    """
    if is_local(address):
        path = local_path(address)
        if not path.is_file():
            raise _missing(address)
        stat = path.stat()
        return ShardFile(address, stat.st_size, str(stat.st_mtime_ns))
    found = tried(address, lambda: _asked(address, "info"))
    if found.get("size") is None:
        raise ValueError(f"{address}: the server does not say its size; copy the shards to a disk")
    tags = [found.get(key) for key in ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified")]
    return ShardFile(address, int(found["size"]), next((str(tag) for tag in tags if tag), ""))


def is_folder(address: str) -> bool:
    """Whether an address that is no .tar can be listed as a folder."""
    if is_local(address):
        return local_path(address).is_dir()
    return not address.startswith("http")


def is_there(address: str) -> bool:
    """Whether a disk has a file or a folder of this very name."""
    return is_local(address) and local_path(address).exists()


def listed(address: str) -> list[str]:
    """The .tar files of a folder, sorted by name."""
    if is_local(address):
        return [str(path) for path in own_files(local_path(address), ".tar")]
    return matching(f"{address.rstrip('/')}/*.tar")


def matching(pattern: str) -> list[str]:
    """The files that a pattern with wildcards names, sorted."""
    if is_local(pattern):
        path = local_path(pattern)
        root = Path(path.anchor or ".")
        found = root.glob(str(path.relative_to(path.anchor) if path.anchor else path))
        return sorted(str(each) for each in found if each.is_file())
    scheme = pattern.partition("://")[0]
    names = tried(pattern, lambda: _asked(pattern, "glob"))
    return sorted(f"{scheme}://{name}" for name in names)


def read_whole(address: str) -> bytes | None:
    """A small file; None where there is none, or none that may be read: a server may say so of
    files that it does not have."""
    if is_local(address):
        path = local_path(address)
        return path.read_bytes() if path.is_file() else None
    try:
        return cast(bytes, tried(address, lambda: _asked(address, "cat_file"), missing=None))
    except (FileNotFoundError, RefusedError):
        return None


@contextlib.contextmanager
def opened_shard(file: ShardFile) -> Iterator[BinaryIO]:
    """A shard to read from and seek in; raises as `shard_file` does, at any read."""
    if not is_local(file.address):
        yield cast(BinaryIO, RangeFile(file))
        return
    path = local_path(file.address)
    if not path.is_file():
        raise _missing(file.address)
    with path.open("rb") as local:
        yield local


class RangeFile:
    """A file on a server that is read by blocks, the last of which are kept."""

    def __init__(self, file: ShardFile) -> None:
        self.file, self.at = file, 0
        self.kept: OrderedDict[int, bytes] = OrderedDict()

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, self.file.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        end = self.file.size if size < 0 else min(self.file.size, self.at + size)
        parts = []
        while self.at < end:
            number, offset = divmod(self.at, BLOCK)
            part = self._block(number)[offset : offset + end - self.at]
            parts.append(part)
            self.at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _block(self, number: int) -> bytes:
        if number not in self.kept:
            self.kept[number] = self._asked(number * BLOCK)
            while len(self.kept) > BLOCKS:
                self.kept.popitem(last=False)
        return self.kept[number]

    def _asked(self, start: int) -> bytes:
        address, end = self.file.address, min(self.file.size, start + BLOCK)

        def ask() -> bytes:
            found: bytes = _asked(address, "cat_file", start=start, end=end)
            if len(found) > end - start:
                raise ValueError(
                    f"{address}: the server does not support range requests; copy the shards to a "
                    "disk"
                )
            if len(found) < end - start:
                raise OSError(f"{len(found):,} of {end - start:,} bytes came")
            return found

        return tried(address, ask)


def tried(address: str, ask: Callable[[], T], missing: T | str | None = "raise") -> T:
    """What `ask` gives, after up to `TRIES` tries. missing: anything but "raise" lets a
    FileNotFoundError through.

    Raises:
        ValueError: there is no such file.
        RefusedError: it may not be read.
        ModuleNotFoundError: no library for it is installed.
        NoAnswerError: all tries failed.
    """
    why = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            return ask()
        except FileNotFoundError:
            if missing != "raise":
                raise
            raise _missing(address) from None
        except (ValueError, ImportError):
            raise
        except Exception as error:  # each file system has errors of its own
            why = " ".join(str(error).split()) or type(error).__name__
            if _is_final(error):
                raise RefusedError(
                    f"{address}: {why}; check the address, and that you may read it, by what the "
                    "libraries read themselves, as AWS_PROFILE and HF_TOKEN"
                ) from None
    raise NoAnswerError(
        f"{address}: {why}; tried {TRIES} times; check the address and the connection, then start "
        "again, which resumes"
    )


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None) or getattr(
        getattr(error, "response", None), "status_code", None
    )
    if isinstance(status, int):
        return 400 <= status < 500 and status not in RETRIED
    return isinstance(error, PermissionError) or "credentials" in str(error).lower()


def _missing(address: str) -> ValueError:
    return ValueError(
        f"{address}: there is no such file; copy it there, or write a pattern of those that are"
    )


def _asked(address: str, name: str, **options: Any) -> Any:
    """One request of a file system, ended after `TIMEOUT` seconds where it can be."""
    system, path = _system(address)
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(system, AsyncFileSystem) and not system.asynchronous:
        call = getattr(system, f"_{name}")
        try:
            return sync(system.loop, call, path, timeout=TIMEOUT, **options)
        except TimeoutError as error:
            raise OSError(f"no answer within {TIMEOUT:g} s") from error
    return getattr(system, name)(path, **options)


def _system(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        system, path = url_to_fs(address)
    except ImportError as error:
        scheme = address.partition("://")[0]
        raise ModuleNotFoundError(
            f"{address}: {EXTRAS.get(scheme, error)}, which reads {scheme}://"
        ) from error
    return system, path
