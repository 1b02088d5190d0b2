"""Run folders that are written without a run, for pages that only read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from trainer.media.made_by import png_bytes, with_facts

HOSTILE = "</script><img id=evil src=x onerror='window.evil=1'>"  # a caption of a user's


def lines_of(path: Path, lines: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def made_run(folder: Path, *, lr: float = 1e-4, steps: int = 40, better_by: float = 0.0) -> Path:
    """A finished run of LoRA, resumed once, with previews of two prompts at three steps. better_by:
    how much lower its losses are."""
    folder.mkdir(parents=True)
    recipe = {
        "recipe": "lora", "backbone": "tiny", "data": {"source": "world", "caption": HOSTILE},
        "methods": {"lora": {"rank": 4}}, "optim": {"lr": lr}, "run": {"steps": steps, "out": "a"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    plan = {
        "methods": {"lora": {"kind": "adapt", "sites": ["a", "b"], "parameters": 1234}},
        "trained": 1234, "total": 61700, "adapter_bytes": 5000,
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for step in (1, *range(10, steps + 1, 10)):
        loss = 1 / step - better_by
        row = {"step": step, "train/loss": loss, "train/loss_smooth": loss, "lr/lora": lr}
        rows.append({**row, "train/images_per_second": 7.0, "train/loss_t062": loss / 2})
        rows += [{"step": step, "val/loss": loss + 0.1}] if step > 1 else []
    rows[-1][HOSTILE] = 1.0  # its name is in the data of the scripts
    lines_of(folder / "metrics.jsonl", rows)
    command = f"python -m trainer fit recipe=lora 'optim.lr={lr}' 'data.caption={HOSTILE}'"
    lines_of(
        folder / "events.jsonl",
        [
            {"event": "started", "step": 0, "command": "python -m trainer fit recipe=lora"},
            {"event": "started", "step": 20, "command": command},
            {"event": "nonfinite", "step": 22, "batches": [{"keys": [HOSTILE]}]},
            {"event": "finished", "step": steps},
        ],
    )
    scores = {"base": {"concept accuracy": 0.0}, "adapted": {"concept accuracy": 0.75, "DIV": None}}
    (folder / "evaluation.json").write_text(json.dumps(scores), encoding="utf-8")
    previews(folder, (0, steps // 2, steps))
    return folder


def previews(folder: Path, steps: Sequence[int], side: int = 24, prompts: int = 2) -> None:
    """Pictures whose grey tells their step and prompt apart, and sheets of maps after step 0."""
    for step in steps:
        place = folder / "previews" / f"step-{step:06d}"
        place.mkdir(parents=True)
        for number in range(prompts):
            prompt = HOSTILE if number else "a fox"
            image = Image.new("RGB", (side, side), (step % 256, 80 * number, 9))
            stem = place / f"{number:02d}-a-fox"
            stem.with_suffix(".png").write_bytes(png_bytes(with_facts(image, {"prompt": prompt})))
            if step:
                sheet = png_bytes(Image.new("RGB", (side * 2, side)), {"words": "a, fox"})
                place.joinpath(f"{stem.name}.maps.png").write_bytes(sheet)
