"""Data source `remote`: shards on a web server, read sample by sample by HTTP range requests.

The manifest that `data build` writes is beside the shards on the server. It has the position of
every member, so the order of samples is the same as from a disk, a resumed run reads nothing
before the sample it resumes at, and every member's CRC-32 is checked.
"""

from __future__ import annotations

import re
import time
import urllib.request
from functools import cached_property, lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from trainer.data.source import Dataset, Needs, NoAnswerError, Source
from trainer.data.source_options import Buckets, OnBad
from trainer.data.tars.manifest import MANIFEST, Shard
from trainer.data.tars.reader import Opening, check_usable, split
from trainer.data.tars.shard_checksums import parse_manifest
from trainer.data.tars.shard_names import is_pattern, names_of

SCHEMES = ("http", "https")
MAX_MANIFEST = 2**28
TRIES, WAIT, TIMEOUT = 4, 0.5, 60.0  # seconds; the wait doubles
# HTTP codes of a busy server; any other error is final
RETRIED = frozenset((408, 425, 429, 500, 502, 503, 504))


class Remote(Source):
    """Shards of a web server, as the source `shards` reads them from a disk."""

    url: str = Field(
        description="the folder of shards on the server, with manifest.json in it; or a pattern of "
        "shards in it, as in https://host/data/shard-{000..010}.tar",
        examples=["https://host/data"],
    )
    validation: int = Field(
        0, ge=0, description="samples to hold out for the validation loss, the last ones"
    )
    on_bad: OnBad = "raise"
    buckets: Buckets = 0

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES or not parts.hostname:
            raise ValueError(
                "give an address that begins with https:// or http://, as https://host/data"
            )
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "leave out user, password and what follows ? or #; the recipe is written into the "
                "run folder and the adapter, where others could read them"
            )
        _folder_and_names(url)
        return url.rstrip("/")

    @cached_property
    def listed(self) -> tuple[Shard, ...]:
        """The shards by the manifest on the server, which is fetched once; raises ValueError as
        `open`."""
        base, wanted = _folder_and_names(self.url)
        address = f"{base}/{MANIFEST}"
        found = parse_manifest(get(address, 0, MAX_MANIFEST), address).shards
        strange = [each.name for each in found if not re.fullmatch(r"[\w-][\w.-]*\.tar", each.name)]
        if strange:
            raise ValueError(f"{address}: {strange[0]!r} is not the plain name of a .tar")
        if wanted is not None:
            listed = {each.name: each for each in found}
            if missing := [name for name in wanted if name not in listed]:
                raise ValueError(
                    f"{address}: does not list {missing[0]}; write a pattern of those it does"
                )
            found = tuple(listed[name] for name in wanted)
        return found

    @property
    def captions_inside(self) -> bool:
        return True

    def epoch(self) -> int:
        samples = sum(len(shard.samples) for shard in self.listed)
        return max(0, samples - self.validation)

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Gets the manifest. Samples are read from the server when they are used.

        Raises:
            ValueError: there is no manifest, or no connection.
            ImageError: samples that cannot be used, all in one message.
        """
        found, base = self.listed, _folder_and_names(self.url)[0]
        bad = check_usable(found, self.url, self.on_bad)
        opening = Opening(
            folder=base, skipped=bad, validation=self.validation, step=self.buckets,
            read=read_remote,
        )  # fmt: skip
        return split(found, needs, opening)


def _folder_and_names(url: str) -> tuple[str, list[str] | None]:
    """The address of the folder, and the names of a pattern of shards; None where all are meant."""
    folder, _, name = url.rpartition("/")
    return (folder, names_of(name)) if is_pattern(name) else (url, None)


def read_remote(folder: Path | str, name: str, *, offset: int, size: int) -> bytes:
    """Bytes of a shard; raises ValueError as `get` does."""
    return get(f"{folder}/{name}", offset, size)


def get(url: str, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on. A failed request is repeated up to `TRIES` times.

    Raises:
        ValueError: the server refuses, or supports no ranges.
        NoAnswerError: it cannot be reached, or is busy.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            return _get_once(url, offset, size)
        except HTTPError as error:
            why = f"{error.code} {error.reason}"
            error.close()
            if error.code not in RETRIED:
                raise ValueError(_failed(url, why)) from None
        except (OSError, HTTPException) as error:
            why = str(error) or type(error).__name__
    raise NoAnswerError(_failed(url, why))


def _failed(url: str, why: str) -> str:
    return f"{url}: {why}; check the address and the connection, then resume with run="


def _get_once(url: str, offset: int, size: int) -> bytes:
    headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    with _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        # a server may answer a request from byte 0 with the complete file
        if offset and answer.status != 206:
            raise ValueError(
                f"{url}: the server does not support range requests; copy the shards to a disk"
            )
        data: bytes = answer.read(size)
    return data


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects to other hosts by HTTP or HTTPS, but never from HTTPS to HTTP."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in SCHEMES or (old, new) == ("https", "http"):
            raise ValueError(f"{req.full_url}: redirected to {newurl}, which is not allowed")
        return super().redirect_request(req, fp, code=code, msg=msg, headers=headers, newurl=newurl)


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """Opens HTTP and HTTPS only; urllib's default also opens ftp:, file: and data:."""
    opener = urllib.request.OpenerDirector()
    handlers = (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _SameScheme(),
    )
    for handler in handlers:
        opener.add_handler(handler)
    return opener
