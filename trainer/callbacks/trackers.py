"""Trackers: TensorBoard by default, wandb where asked (offline when nobody is logged in), or
none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger


def make_trackers(name: str, folder: Path, recipe: Mapping[str, Any]) -> list[Logger]:
    """The loggers of a run; their files lie in the run folder.

    Raises:
        ValueError: wandb is asked for and not installed.
    """
    if name == "none":
        return []
    if name == "tensorboard":
        return [TensorBoardLogger(folder, name="", version="tensorboard")]
    try:
        import wandb
    except ModuleNotFoundError:
        raise ValueError(
            "tracker=wandb needs the package: pip install 'attention-trainer[wandb]'"
        ) from None
    offline = not (os.environ.get("WANDB_API_KEY") or _logged_in())
    # no code, no git diff, no machine facts: a run folder can be shared
    settings = wandb.Settings(disable_git=True, save_code=False, x_disable_meta=True, silent=True)
    return [
        WandbLogger(
            project="attention-trainer", name=folder.name, id=folder.name, save_dir=folder,
            offline=offline,
            settings=settings, config=dict(recipe), resume="allow",
        )
    ]  # fmt: skip


def _logged_in() -> bool:
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
