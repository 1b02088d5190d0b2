"""The pages of runs: what they say, that they fetch nothing, and how a browser shows them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import asked, browse
from made_runs import HOSTILE, made_run

from trainer.runs.page.write_page import (
    MARK,
    refresh_page,
    run_page,
    write_comparison,
    write_run_page,
)

PROBE = """
  const seen = (name) => document.querySelectorAll(name).length;
  const slider = document.getElementById("step");
  const image = document.querySelector("img.adapted"), before = image.src;
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
  const root = document.documentElement;
  return {
    charts: seen(".chart"), drawn: seen(".chart canvas"), sections: seen("h2"),
    fetched: performance.getEntriesByType("resource").filter((x) => x.name.slice(0, 5) !== "data:"),
    evil: [seen("#evil"), typeof window.evil],
    loaded: [...document.images].every((x) => x.naturalWidth > 0),
    moved: before !== image.src, alt: image.alt, at: document.getElementById("at").value,
    said: slider.getAttribute("aria-valuetext"), width: [root.scrollWidth, innerWidth],
    back: getComputedStyle(document.body).backgroundColor,
  };
"""


class Outline(HTMLParser):
    """What a screen reader goes by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def of(self, *names: str) -> list[tuple[str, dict[str, str | None]]]:
        return [each for each in self.tags if each[0] in names]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, a half written one, a foreign folder and a damaged recipe."""
    root = tmp_path_factory.mktemp("runs")
    made_run(root / "lora" / "one")
    made_run(root / "lora" / "two", lr=3e-4, better_by=0.05)
    (root / "lora" / "half" / "checkpoints").mkdir(parents=True)
    (root / "photos" / "holiday").mkdir(parents=True)
    (root / "lora" / "bad").mkdir()
    (root / "lora" / "bad" / "recipe.yaml").write_text("a: [", encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("name", "tree"),
    [
        ("plan.json", {"methods": {"lora": {"sites": 3, "kind": None}, "dora": [1]}}),
        ("plan.json", {"methods": 5, "trained": 10**400, "total": 3, "adapter_bytes": 10**400}),
        ("evaluation.json", {"adapted": {"concept accuracy": 10**400}, "base": [1]}),
        ("metrics.jsonl", {"step": 1, "train/loss": 10**400}),
        ("events.jsonl", {"event": "started", "command": "fit photos-\udcff", "step": 1}),
        ("recipe.yaml", {"methods": {"lora": True}, "backbone": ["\ud800"], "data": 3}),
    ],
)
def test_a_folder_with_strange_values_has_a_page_and_hides_no_other_run(
    name: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    """A command may have bytes that are no text; the rest is of damage or another program's."""
    made_run(tmp_path / "good")
    bad = made_run(tmp_path / "strange")
    (bad / name).write_text(json.dumps(tree), encoding="utf-8")
    assert "strange" in write_run_page(bad).read_text(encoding="utf-8")
    path, count, said = write_comparison(tmp_path)
    assert count == 2 and not said and "good" in path.read_text(encoding="utf-8")


def test_a_page_says_what_its_run_was(runs: Path) -> None:
    text = write_run_page(runs / "lora" / "one").read_text(encoding="utf-8")
    for said in (
        "lora/one", "finished after 40 steps", "1,234 of 61,700 (2.00 %)", "rank=4", "75 %",
        "python -m trainer fit recipe=lora &#39;optim.lr=0.0001&#39;", "step: 22",
    ):  # fmt: skip
        assert said in text, said
    assert text.count("<script") == 3 and HOSTILE not in text
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.S)[0])
    assert [each["title"] for each in data["charts"]][:2] == ["Loss", "Training loss by timestep"]
    assert data["previews"]["steps"] == [20, 40]
    assert len(text) < 200_000


def test_a_page_is_read_aloud_in_order(runs: Path) -> None:
    """Headings without a gap, a text for each picture and chart, headers of tables, a language."""
    text = write_run_page(runs / "lora" / "one").read_text(encoding="utf-8")
    page = Outline(text)
    levels = [int(tag[1]) for tag, _ in page.of("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.of("html")[0][1]["lang"] == "en"
    assert all(attrs.get("alt") for _, attrs in page.of("img")) and page.of("img")
    assert all(attrs.get("scope") for _, attrs in page.of("th"))
    charts = [attrs for _, attrs in page.of("div") if attrs.get("role") == "img"]
    assert "Loss over steps 1 to 40: train/loss from 1 to 0.025" in str(charts[0]["aria-label"])
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    wanted = [str(attrs["aria-labelledby"]) for _, attrs in page.of("section")]
    wanted += [str(attrs["href"])[1:] for _, attrs in page.of("a")]
    assert set(wanted) <= ids
    (label,) = page.of("label")
    assert label[1]["for"] == page.of("input")[0][1]["id"]


def test_a_browser_shows_a_run(runs: Path) -> None:
    """On a phone: all charts are drawn, the slider changes the pictures, nothing is fetched, and
    what users wrote stays text."""
    page = write_run_page(runs / "lora" / "one")
    seen = asked(page, PROBE, "--window-size=380,800")
    assert seen["charts"] == seen["drawn"] == 5
    assert seen["fetched"] == [] and seen["evil"] == [0, "undefined"] and seen["loaded"]
    assert seen["moved"] and seen["at"] == "20" and seen["said"] == "step 20"
    assert seen["alt"] == "a fox, adapted, step 20"
    assert seen["width"][0] <= seen["width"][1]
    assert seen["back"] == "rgb(255, 255, 255)"


def test_a_page_has_a_dark_form_and_prints(runs: Path) -> None:
    page = write_run_page(runs / "lora" / "one")
    dark = asked(page, PROBE, "--blink-settings=preferredColorScheme=0")
    assert dark["back"] == "rgb(21, 24, 28)"
    printed = page.with_name("page.pdf")
    browse(page, f"--print-to-pdf={printed}", "--no-pdf-header-footer")
    assert printed.read_bytes().startswith(b"%PDF") and printed.stat().st_size > 20_000


def test_a_browser_compares_runs(runs: Path) -> None:
    path, count, said = write_comparison(runs)
    assert count == 2 and path == runs / "report.html"
    assert [line.rpartition("/")[2] for line in said] == [
        "bad: its recipe.yaml is damaged, or not that of a run",
        "half: half written, it has no recipe.yaml",
        "photos: no run is in it",
    ]
    script = """
      const by = document.getElementById("by");
      by.value = "concept accuracy";
      const first = document.getElementById("ranked").innerText;
      by.value = "val/loss";
      by.dispatchEvent(new Event("change"));
      const keys = [...document.querySelectorAll("[aria-label=Differences] tbody th")];
      return { first, then: document.getElementById("ranked").innerText,
        keys: keys.map((x) => x.innerText), drawn: document.querySelectorAll("canvas").length };
    """
    seen: dict[str, Any] = asked(path, script)
    assert seen["keys"] == ["optim.lr"]
    assert seen["first"].split("\n") == ["two: -0.025", "one: 0.025"]  # of the training loss
    assert seen["then"].split("\n") == ["two: 0.075", "one: 0.125"]
    assert seen["drawn"] == 6


def test_a_page_is_written_anew_and_no_other_file(runs: Path, tmp_path: Path) -> None:
    folder = made_run(tmp_path / "lora" / "x")
    assert refresh_page(folder) is None and not (folder / "report.html").exists()
    page = write_run_page(folder)
    page.write_text(f"{MARK} an earlier one", encoding="utf-8")
    assert refresh_page(folder) is None and "finished after" in page.read_text(encoding="utf-8")
    page.write_text("<p>my notes</p>", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a page of this program; move it away"):
        write_run_page(folder)
    assert page.read_text(encoding="utf-8") == "<p>my notes</p>"
    assert "move it away" in str(refresh_page(folder))


def test_no_run_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder; name one with runs"):
        write_comparison(tmp_path / "none")
    with pytest.raises(ValueError, match="no run is in it; name a run folder"):
        write_comparison(tmp_path)
    with pytest.raises(ValueError, match="a folder of runs is given as runs="):
        write_run_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_nothing_but_its_recipe_has_a_page(tmp_path: Path) -> None:
    from trainer.runs.page.record import read_record

    (tmp_path / "recipe.yaml").write_text("methods: {lora: null}", encoding="utf-8")
    text = run_page(read_record(tmp_path))
    assert "not finished; known up to step 0" in text and "None is recorded" in text
