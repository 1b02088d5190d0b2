"""Headers read faster are those that tarfile reads, or are left to it."""

from __future__ import annotations

import random
import tarfile
from typing import Any

import pytest

from trainer.data.tars.quick_headers import QuickInfo


def read(cls: Any, header: bytes) -> Any:
    """What readers of shards use of a header, or the name of the error."""
    try:
        found = cls.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return type(error).__name__
    return found.name, found.size, found.type, found.isreg(), found.issparse(), found.chksum


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_plain_headers_are_the_same(form: int) -> None:
    for name, size in (("a.png", 0), ("deep/er/000012.latent.npy", 2**31), ("x" * 99, 7)):
        info = tarfile.TarInfo(name)
        info.size = size
        header = info.tobuf(form)
        assert read(QuickInfo, header) == read(tarfile.TarInfo, header)
        assert QuickInfo.frombuf(header, "utf-8", "strict").name == name


def test_odd_headers_are_left_to_tarfile() -> None:
    for change in (
        {"type": tarfile.SYMTYPE}, {"type": tarfile.DIRTYPE}, {"name": "ä.png"},
        {"size": 2**40}, {"type": tarfile.AREGTYPE, "name": "folder/"},
    ):  # fmt: skip
        info = tarfile.TarInfo("a.png")
        for key, value in change.items():
            setattr(info, key, value)
        header = info.tobuf(tarfile.GNU_FORMAT)
        assert read(QuickInfo, header) == read(tarfile.TarInfo, header)
    for header in (b"", b"\0" * 512, b"x" * 511):
        assert read(QuickInfo, header) == read(tarfile.TarInfo, header)


def test_changed_headers_give_what_tarfile_gives() -> None:
    """Bytes changed at random, half of them with a checksum that fits again."""
    rng = random.Random(0)
    for number in range(3000):
        info = tarfile.TarInfo(rng.choice(["a.png", "b/c.txt", "x" * 90]))
        info.size = rng.choice([0, 511, 512, 10**6])
        header = bytearray(info.tobuf(rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT]))[:512])
        for _ in range(rng.randrange(1, 4)):
            field = rng.choice([(0, 100), (124, 136), (148, 157), (257, 265), (345, 500)])
            header[rng.randrange(*field)] = rng.choice([0, 32, 48, 55, 56, 128, 255, 47])
        if number % 2:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        one, other = read(QuickInfo, bytes(header)), read(tarfile.TarInfo, bytes(header))
        assert one == other, bytes(header)
