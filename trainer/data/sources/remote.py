"""Data source `remote`: shards on a web server, read sample by sample by HTTP range requests.

The manifest that `data build` writes lies beside the shards on the server. It says where every
member is, so the order is that of the same shards on a disk, a resumed run begins at its place
without reading what is before it, and every sample's CRC-32 is compared.
"""

from __future__ import annotations

import re
import time
import urllib.request
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from trainer.data.source import Dataset, Needs, Source
from trainer.data.source_options import Buckets, OnBad
from trainer.data.tars.ledger import parse_manifest
from trainer.data.tars.manifest import MANIFEST
from trainer.data.tars.reader import check_usable, split

SCHEMES = ("http", "https")
MAX_MANIFEST = 2**28
TRIES, WAIT, TIMEOUT = 4, 0.5, 60.0  # seconds; the wait doubles
# the server is busy or asks for patience; any other answer is final
AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))


class Remote(Source):
    """Shards of a web server, as the source `shards` reads them from a disk."""

    url: str = Field(
        description="the folder of shards on the server, with manifest.json in it",
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
            raise ValueError("an address is needed, as https://host/data; nothing else is opened")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(
                "leave out user, password and what follows a ?; a recipe is written into the run "
                "folder and the adapter, where they would be read by others"
            )
        return url.rstrip("/")

    def open(self, needs: Needs) -> tuple[Dataset, Dataset | None]:
        """Gets the manifest; shards are asked for when their samples are.

        Raises:
            ValueError: there is no manifest, or no connection.
            ImageError: samples that cannot be used, all in one message.
        """
        place = f"{self.url}/{MANIFEST}"
        found = parse_manifest(get(place, 0, MAX_MANIFEST), place).shards
        strange = [each.name for each in found if not re.fullmatch(r"[\w-][\w.-]*\.tar", each.name)]
        if strange:
            raise ValueError(f"{place}: {strange[0]!r} is no plain name of a .tar")
        bad = check_usable(found, self.url, self.on_bad)
        return split(found, self.url, needs, self.validation, bad, self.buckets, read_remote)


def read_remote(folder: Path | str, name: str, offset: int, size: int) -> bytes:
    """Bytes of a shard; raises ValueError, see `get`."""
    return get(f"{folder}/{name}", offset, size)


def get(url: str, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on; a failing connection is tried again a few times.

    Raises:
        ValueError: the server refuses, knows no ranges, or cannot be reached; names the address.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            return _get_once(url, offset, size)
        except HTTPError as error:
            why = f"{error.code} {error.reason}"
            error.close()
            if error.code not in AGAIN:
                break
        except (OSError, HTTPException) as error:
            why = str(error) or type(error).__name__
    raise ValueError(f"{url}: {why}; check the address and the connection, then go on with run=")


def _get_once(url: str, offset: int, size: int) -> bytes:
    headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    with _opener().open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        # an empty range of the whole is how small files may be answered
        if offset and answer.status != 206:
            raise ValueError(
                f"{url}: the server knows no range requests; copy the shards to a disk"
            )
        data: bytes = answer.read(size)
    return data


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows to other hosts, never to another kind of address, nor out of TLS."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in SCHEMES or (old, new) == ("https", "http"):
            raise ValueError(f"{req.full_url}: redirected to {newurl}, which is not opened")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@lru_cache(maxsize=1)
def _opener() -> urllib.request.OpenerDirector:
    """Knows HTTP and HTTPS; unlike urllib's own, not ftp:, file: and data:."""
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
