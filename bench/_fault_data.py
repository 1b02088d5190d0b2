"""Rows of bench/faults.py: what a run is fed."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Bars
from _fault_left import HANG, Row, expect, lines, listed, of, step_names
from _faulty import TESTS, Ended, Place, in_turn, load


def shards(bars: Bars, place: Place, quick: bool) -> list[Row]:
    tests = load(TESTS / "faults" / "test_data.py")
    cases = [spoil for spoil, *_ in tests.DAMAGE]
    cases = cases[:4] if quick else cases

    def fresh(name: str) -> Path:
        folder: Path = tests.make(place.new(name) / "shards", 4, 3)
        expect(place.fork(_built, str(folder)).wait(), 0)
        return folder

    def learned(folder: Path) -> tuple[Ended, Counter[Any]]:
        out = place.new("plain-shards")
        words = ("--tars", "--data", str(folder), "--out", str(out), "--epochs", "1")
        ended = place.plain(*words, "--steps", "-1", "--batch", "1", "--every", "1000").wait()
        rows = [json.loads(line) for line in lines(out / "seen-0.jsonl")]
        return ended, Counter((*row["keys"], *row["captions"], *row["pixels"]) for row in rows)

    def spoiled(spoil: Callable[[Path], None]) -> tuple[bool, str]:
        folder = fresh(spoil.__name__)
        spoil(folder)
        recipe = folder.parent / "mine.yaml"
        recipe.write_text(tests.RECIPE.format(shards=folder))
        run = place.new("shards-run")
        ended = place.ours(run, {}, f"recipe={recipe}").wait()
        named = re.search(r"shard-00000\d\.tar|more\.tar", ended.said) is not None
        refused = ended.code == 78 and named and not step_names(run)
        plain, got = learned(folder)
        return refused, "raises" if plain.code else "unharmed" if got == wanted else "silent"

    expected, wanted = learned(fresh("whole"))
    expect(expected, 0)
    did = dict(zip(cases, in_turn([lambda s=s: spoiled(s) for s in cases]), strict=True))  # type: ignore[misc]
    refused = sum(found for found, _ in did.values())
    bars.exactly("shards_refused", refused, len(cases))
    by = {kind: [s.__name__ for s, (_, k) in did.items() if k == kind] for kind in
          ("raises", "silent", "unharmed")}  # fmt: skip
    bars.note("shards", {"ours_refused": refused, "lightning": by})
    return [
        Row(
            f"{len(cases)} kinds of damage to a shard (webdataset in the plain script)",
            f"{of(refused, len(cases))} refused before the first step, the shard named",
            f"{len(by['raises'])} raise; {len(by['silent'])} train in silence on something else "
            f"({listed(by['silent'])}); {len(by['unharmed'])} change nothing for it "
            f"({listed(by['unharmed'])})",
        )
    ]


def _built(folder: str) -> None:
    from trainer.__main__ import main

    raise SystemExit(main(["data", "build", f"shards={folder}"]))


def images(bars: Bars, place: Place, quick: bool) -> list[Row]:
    """Bad pictures, and pictures that are no plain photos, opened as a run of each opens them."""
    from _plain_lightning import Pictures, to_tensor
    from torch.utils.data import DataLoader

    tests = load(TESTS / "faults" / "test_data.py")

    def ours(data: bytes, suffix: str) -> Any:
        try:
            return tests.captured("folder", data, suffix, place.new("image") / "in").image(0)
        except ValueError as error:
            return str(error)

    def plain(data: bytes, suffix: str) -> Any:
        folder = place.new("plain-image")
        (folder / f"a.{suffix}").write_bytes(data)
        good = io.BytesIO()
        tests.noise(9).save(good, "PNG")
        (folder / "good.png").write_bytes(good.getvalue())
        for name in ("a", "good"):
            (folder / f"{name}.txt").write_text(name)
        try:
            return next(iter(DataLoader(Pictures(folder), 2)))["image"][0]
        except Exception as error:  # whatever PIL makes of it
            return f"{type(error).__name__}: {error}"

    found: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (data, suffix, _) in tests.REFUSED.items():
            mine, other = ours(data, suffix), plain(data, suffix)
            told = isinstance(mine, str) and f"a.{suffix}" in mine
            found[name] = {
                "ours": "refused" if told else "trained",
                "lightning": "raises" if isinstance(other, str) else "trained",
            }
        for name, (data, suffix, expected, within) in tests.CONVERTED.items():
            wanted = (to_tensor(expected.crop((8, 0, 40, 32))) + 1) * 127.5
            made = {"ours": ours(data, suffix), "lightning": plain(data, suffix)}
            found[name] = {column: _kind(got, wanted, within) for column, got in made.items()}
    bad, kinds = list(tests.REFUSED), list(tests.CONVERTED)
    refused = [name for name in bad if found[name]["ours"] == "refused"]
    right = [name for name in kinds if found[name]["ours"] == "right"]
    bars.exactly("images_refused", len(refused), len(bad))
    bars.exactly("images_right", len(right), len(kinds))
    bars.note("images", found)
    raised = [name for name in bad if found[name]["lightning"] == "raises"]
    silent = [name for name in bad if name not in raised]
    plain_right = [name for name in kinds if found[name]["lightning"] == "right"]
    wrong = [name for name in kinds if name not in plain_right]
    return [
        Row(
            f"{len(bad)} kinds of bad pictures",
            f"{of(len(refused), len(bad))} refused before the first step, by name",
            f"{len(raised)} raise when their turn comes; {len(silent)} are trained on in silence "
            f"({listed(silent)})",
        ),
        Row(
            f"{len(kinds)} kinds of pictures that are no plain photos ({listed(kinds)})",
            f"{of(len(right), len(kinds))} as a viewer shows them",
            f"{len(plain_right)} as a viewer shows them; not {listed(wrong)}",
        ),
    ]


def _kind(got: Any, wanted: torch.Tensor, within: int) -> str:
    """What became of a picture (3, h, w) that should be `wanted`, in 0..255."""
    if isinstance(got, str):
        return "raises"
    apart = abs(np.asarray((got + 1) * 127.5) - np.asarray(wanted)).round()
    apart[:, :, 14:18] = 0  # JPEG blurs the edge
    return "right" if apart.max() <= within else "other"


def uneven(bars: Bars, place: Place, quick: bool) -> list[Row]:
    """Two ranks with two data workers each."""
    tests = load(TESTS / "faults" / "test_data.py")
    kinds = {"one sample": (1,), "shards of 1, 2 and 4 samples": (1, 2, 4)}
    rows, good = [], 0
    for name, counts in list(kinds.items())[: 1 if quick else None]:
        folder = tests.make(place.new("uneven") / "shards", *counts)
        recipe = folder.parent / "mine.yaml"
        recipe.write_text(tests.RECIPE.format(shards=folder))
        run, out = place.new("uneven-run"), place.new("plain-uneven")
        own = (f"recipe={recipe}", "run.workers=2", "run.cache_latents=false", "run.steps=3")
        ended = place.ours_ranks(run, {}, 2, *own).wait()
        steps = max(step_names(run), default=0)
        good += ended.code == 0 and steps == 3
        words = ("--tars", "--data", str(folder), "--out", str(out), "--steps", "3")
        plain = place.plain_ranks(2, *words, "--batch", "1", "--workers", "2").wait(HANG)
        done = [len(lines(out / f"seen-{rank}.jsonl")) for rank in (0, 1)]
        rows.append(
            Row(
                f"two ranks with two workers each; {name}",
                f"{ended.text()}; {steps} of 3 steps",
                f"{plain.text()}; {done[0]} and {done[1]} of 3 steps",
            )
        )
    bars.exactly("uneven_done", good, len(rows))
    return rows
