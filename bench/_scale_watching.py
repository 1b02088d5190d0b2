"""What watching a run costs: the size of its page, how soon a browser paints it, and the share of a
step that trackers, page and guards take."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

from _common import Bars, command

from trainer.config.load import load_recipe
from trainer.training.callbacks.hang import HangGuard
from trainer.training.callbacks.metrics import Metrics
from trainer.training.callbacks.nonfinite_and_signals import StepChecks
from trainer.training.callbacks.run_page import RunPage
from trainer.training.callbacks.save_and_restore import Checkpoints
from trainer.training.callbacks.side_work import SideWork
from trainer.training.fit import fit
from trainer.training.trackers.steady import Steady

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from browser import FLAGS, chromium

LOADS = 5  # of the page, of which the median counts
HOOKS = (
    "on_train_start", "on_train_batch_start", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_end", "on_train_end",
)  # fmt: skip
WATCHERS = (Metrics, RunPage, HangGuard, StepChecks, Checkpoints, SideWork)
# delays the load event, at which Chromium prints the page, until it has been painted
WAIT = '<img src="/wait" alt=""></body>'
PAINT = """<script>addEventListener("load", () => {
  const own = document.createElement("pre"); own.id = "paint";
  own.textContent = performance.getEntriesByName("first-contentful-paint")[0].startTime;
  document.body.append(own);
});</script>"""


def page(bars: Bars) -> None:
    """`report.html` of LoRA after 1,000 steps, with four previews of eleven steps."""
    steps = 20 if bars.quick else 1000
    words = [
        "recipe=custom_diffusion", f"run.steps={steps}", f"preview.every={steps // 10}",
        "data.prior_images=8", "data.prior_steps=4", "preview.steps=4", "run.id=long",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        command("fit", *words, folder=folder, cache=folder / "cache")
        report = folder / "runs" / "custom_diffusion" / "long" / "report.html"
        bars.at_most("page_mb", report.stat().st_size / 1e6, 3)
        paints = [first_paint(report) for _ in range(LOADS)]
    bars.note("page_first_paints_ms", [round(each) for each in paints])
    bars.at_most("page_first_paint_seconds", median(paints) / 1000, 1)


def first_paint(report: Path) -> float:
    """Milliseconds from the start of the navigation until a new browser has painted something."""
    text = report.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    text = text.replace("</body>", PAINT + WAIT)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/wait":
                time.sleep(2)
            data = b"" if self.path == "/wait" else text.encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        words = [chromium(), *FLAGS, f"--user-data-dir={profile}", "--dump-dom"]
        address = f"http://127.0.0.1:{server.server_port}/"
        shown = subprocess.run([*words, address], capture_output=True, text=True, timeout=120)
    server.shutdown()
    found = re.search(r'<pre id="paint">([\d.]+)</pre>', shown.stdout)
    assert found is not None, f"nothing was painted: {shown.stderr[-1000:]}"
    return float(found[1])


def watching(bars: Bars) -> None:
    """Seconds in the hooks of trackers, page and guards, and those that the thread of the tracker
    computes, over the seconds of all steps: LoRA with TensorBoard, a line every ten steps,
    validation and page every 200. The norm of the gradients and their cutting are among them, which
    a run without guards does elsewhere."""
    steps = 12 if bars.quick else 600
    words = ["recipe=lora", f"run.steps={steps}", "data.prior_weight=0", "preview.every=0"]
    words += ["run.checkpoint_every=0", *(["run.validate_every=4"] if bars.quick else [])]
    with tempfile.TemporaryDirectory() as scratch, timed() as spent:
        folder = fit(load_recipe(words), Path(scratch) / "run")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    known = [row for row in rows if "train/loss" in row and row["step"] > 1]
    samples = rows[0]["data/samples"] / rows[0]["step"]
    step = median(samples / row["train/images_per_second"] for row in known)
    by_part = {name: 1000 * own / steps for name, own in spent.items()}
    bars.note("watching_ms_a_step", {name: round(own, 4) for name, own in by_part.items()})
    bars.note("watching_step_ms", round(1000 * step, 2))
    bars.at_most("watching_percent", 100 * sum(spent.values()) / (steps * step), 1)


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds in the hooks of each watcher, and of the tracker's thread; inside the block."""
    spent = dict.fromkeys([*(each.__name__ for each in WATCHERS), "tracker"], 0.0)
    kept = [(own, name, vars(own)[name]) for own in WATCHERS for name in HOOKS if name in vars(own)]
    kept += [(RunPage, "write", RunPage.write), (Steady, "attempt", Steady.attempt)]
    for own, name, function in kept:
        if name == "on_validation_end" and own is RunPage:
            continue  # `write` is counted, also when the run has ended
        part = "tracker" if own is Steady else own.__name__
        clock = time.thread_time if own is Steady else time.perf_counter
        setattr(own, name, _clocked(function, spent, part=part, clock=clock))
    try:
        yield spent
    finally:
        for own, name, function in kept:
            setattr(own, name, function)


def _clocked(
    function: Any, spent: dict[str, float], *, part: str, clock: Callable[[], float]
) -> Any:
    @functools.wraps(function)
    def clocked(*arguments: Any, **options: Any) -> Any:
        began = clock()
        try:
            return function(*arguments, **options)
        finally:
            spent[part] += clock() - began

    return clocked


PARTS: dict[str, Callable[[Bars], None]] = {"page": page, "watching": watching}
