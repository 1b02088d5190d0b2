"""Headers of tars read faster: a plain file's, as nearly all are, by the few fields that readers of
shards use; every other one by `tarfile` itself."""

from __future__ import annotations

import tarfile

PLAIN = (b"ustar\x0000", b"ustar  \0")  # magic and version, POSIX and GNU


class QuickInfo(tarfile.TarInfo):
    """A member with name, size and checksum; the owner and the times of a plain file are left out.
    Use it as `tarfile.open(..., tarinfo=QuickInfo)`."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> QuickInfo:
        """Raises tarfile.HeaderError as `tarfile.TarInfo.frombuf`."""
        found = _plain(cls, bytes(buf)) if len(buf) == tarfile.BLOCKSIZE else None
        return super().frombuf(buf, encoding, errors) if found is None else found


def _plain(cls: type[QuickInfo], header: bytes) -> QuickInfo | None:
    """None where a header is not that of a plain file, with the plainest spelling of its fields."""
    size, said = header[124:135], header[148:154]
    if header[257:265] not in PLAIN or header[156:157] != tarfile.REGTYPE or header[345]:
        return None
    if not (size.isdigit() and said.isdigit() and header[135] in b"\0 " and header[154] in b"\0 "):
        return None
    name = header[:100].partition(b"\0")[0]
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if not name.isascii() or name.endswith(b"/") or b"8" in size + said or b"9" in size + said:
        return None
    if int(said, 8) != total:
        return None
    found = cls(name.decode("ascii"))
    found.size, found.chksum = int(size, 8), total
    return found
