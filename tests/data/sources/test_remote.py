"""The source `remote` against a real server: the same samples in the same order, nothing else
opened."""

from __future__ import annotations

import http.server
import io
import json
import pickle
import re
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data.loader import Planned, loader
from trainer.data.plan import StepPlan
from trainer.data.source import Needs, Source
from trainer.data.sources import remote
from trainer.data.sources.remote import Remote
from trainer.data.sources.shards import Shards
from trainer.data.tars.write_shards import write_world

RNG = np.random.default_rng(0)
SECOND = "world-000001.tar"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `root` by ranges; `answers` are given first, (status, headers) each."""

    root: Path
    answers: list[tuple[int, dict[str, str]]]
    asked: list[tuple[str, str | None]]
    ranges = True

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Range"]))
        if self.answers:
            status, headers = self.answers.pop(0)
            self._answer(status, b"", headers)
            return
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self._answer(404, b"", {})
            return
        data, wanted = path.read_bytes(), self.headers["Range"]
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if found is None or not self.ranges:
            self._answer(200, data, {})
            return
        first, last = int(found[1]), min(int(found[2]), len(data) - 1)
        part = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._answer(206, data[first : last + 1], part)

    def _answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "world"
    write_world(folder, 7, seed=3, per_shard=4)
    return folder


@pytest.fixture
def served(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(address, handler class) of a server with a copy of the shards."""
    for path in world.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(remote, "WAIT", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    remote._opener.cache_clear()
    handler = type("Own", (Handler,), {"root": tmp_path, "answers": [], "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()
    server.server_close()


def opened(source: Source, path: Path) -> Any:
    needs = Needs(64, 4, lambda prompts, seed, guidance: (), path / "cache", lambda: "tiny")
    return source.open(needs)[0]


def planned(data: Any, rank: int = 0, ranks: int = 1) -> Planned:
    return Planned(data, StepPlan(((0, len(data)),), (1.0,), (1.0,), 2, 5), None, rank, ranks)


def test_the_same_samples_in_the_same_order(served: Any, world: Path, tmp_path: Path) -> None:
    url, handler = served
    far, near = opened(Remote(url=f"{url}/"), tmp_path), opened(Shards(shards=world), tmp_path)
    assert [path for path, _ in handler.asked] == ["/manifest.json"]
    assert far.fingerprint() == near.fingerprint()
    one, other = planned(pickle.loads(pickle.dumps(far))), planned(near)
    for step in (5, 0, 3):
        assert one[step].keys == other[step].keys
        assert one[step].captions == other[step].captions
        assert one[step].pixels.equal(other[step].pixels)  # type: ignore[union-attr]
    assert [path for path, asked in handler.asked[1:] if asked is None] == []
    handler.asked.clear()
    (last,) = loader(planned(far), 9, 8, 0)  # resumed: nothing before it is asked for
    assert last.keys == other[8].keys
    assert len(handler.asked) == 4  # an image and a caption of each of two samples


def test_a_busy_server_is_asked_again(served: Any, tmp_path: Path) -> None:
    url, handler = served
    far = opened(Remote(url=url), tmp_path)
    first = far.caption(0, RNG)
    handler.answers += [(503, {}), (429, {}), (500, {})]
    assert far.caption(0, RNG) == first
    handler.answers += [(503, {})] * 4
    with pytest.raises(ValueError, match=r"world-000000\.tar: 503 .*check the address"):
        far.caption(0, RNG)


def test_damage_is_found_where_it_is_met(served: Any, tmp_path: Path) -> None:
    url, _ = served
    far = opened(Remote(url=url), tmp_path)
    data = bytearray((tmp_path / SECOND).read_bytes())
    data[far.rows[5][1].members["png"].offset + 100] ^= 1
    (tmp_path / SECOND).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{SECOND}: the bytes of scene-3-5\.png"):
        far.image(5)
    assert far.image(4).shape == (3, 64, 64)
    (tmp_path / SECOND).write_bytes(data[: far.rows[5][1].members["png"].offset + 9])
    with pytest.raises(ValueError, match=rf"{SECOND}: the bytes of scene-3-5\.png"):
        far.image(5)
    (tmp_path / SECOND).unlink()
    with pytest.raises(ValueError, match=rf"{SECOND}: 404"):
        far.image(5)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json: 404"):
        opened(Remote(url=url), tmp_path)


def test_a_server_without_ranges_is_refused(served: Any, tmp_path: Path) -> None:
    url, handler = served
    handler.ranges = False
    far = opened(Remote(url=url), tmp_path)
    with pytest.raises(ValueError, match="does not support range requests; copy the shards"):
        far.image(2)


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/a", "data:text/plain,x"])
def test_a_redirect_opens_nothing_else(served: Any, tmp_path: Path, to: str) -> None:
    url, handler = served
    handler.answers.append((302, {"Location": to}))
    with pytest.raises(ValueError, match=r"redirected to .* not opened|edirect.* not allowed"):
        opened(Remote(url=url), tmp_path)


def test_a_redirect_does_not_leave_tls() -> None:
    request = urllib.request.Request("https://host/a.tar")
    hop = remote._SameScheme()
    with pytest.raises(ValueError, match="redirected to http://host/a, which is not allowed"):
        hop.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://host/a")
    followed = hop.redirect_request(request, io.BytesIO(), 302, "Found", {}, "https://other/a")
    assert followed is not None and followed.full_url == "https://other/a"


def test_a_redirect_to_another_place_is_followed(served: Any, tmp_path: Path) -> None:
    url, handler = served
    handler.answers.append((302, {"Location": f"{url}/manifest.json"}))
    assert len(opened(Remote(url=url), tmp_path)) == 7


def test_a_manifest_names_shards_of_its_folder_only(served: Any, tmp_path: Path) -> None:
    url, _ = served
    place = tmp_path / "manifest.json"
    for name in ("../a.tar", "http://other/a.tar", "a.tar?x", "/a.tar", "..tar"):
        listed = json.loads(place.read_text())
        listed["shards"][0]["name"] = name
        place.write_text(json.dumps(listed))
        with pytest.raises(ValueError, match=r"is not the plain name of a \.tar"):
            opened(Remote(url=url), tmp_path)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("pipe:cat a.tar", "give an address that begins with https"),
        ("file:///data", "give an address that begins with https"),
        ("s3://bucket/a", "give an address that begins with https"),
        ("ftp://host/a", "give an address that begins with https"),
        ("https:///a", "give an address that begins with https"),
        ("./shards", "give an address that begins with https"),
        ("https://me:word@host/a", "leave out user, password"),
        ("https://host/a?X-Signature=1", "leave out user, password"),
    ],
)
def test_only_addresses_of_the_web_are_taken(url: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        build_section(Remote, {"url": url}, "data")


def test_each_repetition_waits_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)

    def fails(url: str, offset: int, size: int) -> bytes:
        raise OSError("connection reset")

    monkeypatch.setattr(remote, "_get_once", fails)
    with pytest.raises(ValueError, match="connection reset"):
        remote.get("http://127.0.0.1:9/a.tar", 0, 8)
    assert waited == [0.5, 1.0, 2.0]  # four requests


def test_a_pattern_chooses_shards_of_the_manifest(served: Any, tmp_path: Path) -> None:
    address, _ = served
    one = opened(Remote(url=f"{address}/world-{{000001..000001}}.tar"), tmp_path)
    every = opened(Remote(url=address), tmp_path)
    assert len(one) == 3 and one.key(0) == every.key(4)
    assert one.sample(0, RNG).image.equal(every.sample(4, RNG).image)
    with pytest.raises(ValueError, match=r"does not list world-000002\.tar"):
        opened(Remote(url=f"{address}/world-{{000001..000002}}.tar"), tmp_path)


@pytest.mark.parametrize("url", ["https://host/a-{0..", "https://host/a-{3..1}.tar"])
def test_a_pattern_that_names_nothing_is_refused_before_a_run(url: str) -> None:
    with pytest.raises(RecipeError, match=r"data\.url"):
        build_section(Remote, {"url": url}, "data")
