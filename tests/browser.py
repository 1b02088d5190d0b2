"""A page in headless Chromium: what it shows after its scripts have run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
SOON = "--virtual-time-budget=3000"  # milliseconds that timers see pass, at once
ANSWER = "answer-of-the-probe"


def chromium() -> str:
    """Its path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here; on Debian `apt-get install chromium` brings it")
    return found


def browse(page: Path, *flags: str) -> str:
    """Opens a file, and returns what Chromium prints."""
    words = [chromium(), *FLAGS, f"--user-data-dir={page.parent / 'browser'}", SOON, *flags]
    done = subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def asked(page: Path, script: str, *flags: str) -> Any:
    """What a script returns that is run in a page after its own ones. script: the body of a
    function."""
    probe = f"""<script>addEventListener("load", () => setTimeout(() => {{
      const own = document.createElement("pre");
      own.id = "{ANSWER}";
      own.textContent = JSON.stringify((() => {{ {script} }})());
      document.body.append(own);
    }}, 500));</script></body>"""
    copy = page.with_name(f"asked-{page.name}")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    found = re.search(f'<pre id="{ANSWER}">(.*?)</pre>', browse(copy, "--dump-dom", *flags), re.S)
    assert found is not None, "the scripts of the page have failed"
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
