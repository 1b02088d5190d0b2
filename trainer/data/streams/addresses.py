"""Addresses of shards: names on a disk or a server, with ranges, lists and wildcards.

./shards                              every .tar of a folder, also of s3://, gs:// and hf://
https://host/data/{00000..00099}.tar  a hundred shards
s3://bucket/{train,extra}-*.tar       what a wildcard finds
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from trainer.data.streams.server_file import is_folder, is_there, listed, matching
from trainer.data.tars.shard_names import names_of

SCHEMES = ("s3", "gs", "hf", "https", "http")
WILD = re.compile(r"[*?\[]")


def check_address(address: str) -> str:
    """An address, or a pattern of some, as it is.

    Raises:
        ValueError: a scheme that is not read, a user, a password or a signature in it, or braces or
            a wildcard that are not understood.
    """
    scheme, _, rest = address.rpartition("://")
    if re.match(r"pipe:|[a-z][a-z0-9+.-]*::", address, re.IGNORECASE) or "::" in address:
        raise ValueError(f"{address}: commands and chained addresses are not read")
    if not scheme and re.match(r"[a-z][a-z0-9+.-]+:", address, re.IGNORECASE):
        raise ValueError(
            f"{address}: no local path and no address; write it as in s3://bucket/a.tar"
        )
    if scheme and scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"{address}: {scheme}:// is not read; give a local path, or {known}")
    if not rest.strip("/"):
        raise ValueError(
            f"{address!r}: give the address of shards, as in ./shards/{{000..009}}.tar"
        )
    web = scheme in ("http", "https")
    if (scheme and "@" in rest.partition("/")[0]) or (web and re.search(r"[?#]", rest)):
        raise ValueError(
            "leave out user, password and what follows ? or #; the recipe is written into the run "
            "folder and the adapter, where others could read them"
        )
    if web and (WILD.search(rest) or not rest.endswith(".tar")):
        raise ValueError(
            f"{address}: a web server does not list its files; name every shard, as in "
            "https://host/data/{00000..00099}.tar"
        )
    names_of(address)
    return address


def shards_at(patterns: Sequence[str]) -> list[str]:
    """The address of every shard, in the order of the patterns; what a wildcard or a folder holds
    is in the order of its names.

    Raises:
        ValueError: no shard is there, one is named twice, or a name is not that of a .tar.
        NoAnswerError: the server gives no answer.
    """
    found = [shard for pattern in patterns for name in names_of(pattern) for shard in _at(name)]
    seen: set[str] = set()
    for shard in found:
        if not shard.endswith(".tar"):
            raise ValueError(f"{shard}: not a .tar; give plain .tar files, not compressed ones")
        if shard in seen:
            raise ValueError(f"{shard}: named twice; leave one out")
        seen.add(shard)
    return found


def _at(name: str) -> list[str]:
    if WILD.search(name) and not is_there(name):  # a folder on a disk may be called [a]
        if found := matching(name):
            return found
        raise ValueError(f"{name}: there is no such file; check the name, and what it begins with")
    if name.endswith(".tar") or not is_folder(name):
        return [name]
    if found := listed(name):
        return found
    raise ValueError(f"{name}: no .tar in this folder; give a folder of .tar files")
