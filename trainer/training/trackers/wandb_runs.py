"""wandb: online where somebody is logged in, else offline in the folder `wandb` of a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL.Image import Image

from trainer.training.tracker_id import tracker_id
from trainer.training.trackers.tracker import PROJECT, shown_name

UPLOADS = 60  # seconds that the end of a run waits for uploads


class WandbTracker(WandbLogger):
    """Its steps are those of the run, with Lightning's `trainer/global_step` beside them. What is
    logged again after a resume, when wandb is at a later step, follows there: wandb would drop it
    under its own step."""

    least = 0  # the first step that wandb still takes

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        run = self.experiment
        least = max(self.least, run.starting_step)
        taken = step is not None and step >= least
        run.log({**metrics, "trainer/global_step": step}, step=step if taken else None)
        self.least = step if taken and step is not None else least + 1

    def log_settings(self, settings: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Does nothing: the run was made with them."""

    def log_pictures(
        self, name: str, pictures: Sequence[Image], *, prompts: Sequence[str], step: int
    ) -> None:
        """Each alone, in its full size."""
        self.log_image(name, list(pictures), step=step, caption=list(prompts))

    def log_clip(self, name: str, files: Sequence[Path], *, step: int) -> None:
        self.log_video(name, [str(files[0])], step=step)

    def finalize(self, status: str) -> None:
        """Also ends wandb's own run, which it would otherwise continue with the next run of this
        process."""
        super().finalize(status)
        import wandb

        wandb.finish(exit_code=0 if status == "success" else 1)


def wandb_trackers(
    folder: Path, settings: Mapping[str, Any], *, say: Callable[[str], None]
) -> list[WandbTracker]:
    """An online and an offline one if somebody is logged in, else an offline one. `wandb sync`
    uploads what an offline one stored."""
    import wandb

    # no code, no git diff, no machine facts: a run folder can be shared
    private = wandb.Settings(
        disable_git=True, save_code=False, x_disable_meta=True, silent=True,
        finish_timeout=UPLOADS, finish_timeout_raises=True,
    )  # fmt: skip
    online = bool(os.environ.get("WANDB_API_KEY")) or logged_in()
    own = tracker_id(folder, say)
    return [
        WandbTracker(
            project=PROJECT, name=shown_name(folder), id=own, save_dir=folder,
            offline=offline, mode="offline" if offline else None,
            settings=private, config=dict(settings), resume="allow",
        )
        for offline in ((False, True) if online else (True,))
    ]  # fmt: skip


def why_wandb_failed(tracker: WandbTracker, folder: Path, error: Exception) -> str | None:
    """What is to be done where not all was uploaded; and ends wandb, which still uses the id of the
    run. None for another failure."""
    import wandb

    sync = sync_command(folder, tracker)
    wandb.teardown()
    if not isinstance(error, TimeoutError):
        return None
    return f"not all was uploaded after {UPLOADS:g} seconds, `{sync}` sends the rest"


def how_to_upload(tracker: WandbTracker, folder: Path) -> str | None:
    """Of a tracker that was offline and has made its files."""
    if not tracker._offline or tracker._experiment is None:
        return None
    return f"wandb was offline; to upload this run: {sync_command(folder, tracker)}"


def sync_command(folder: Path, tracker: WandbLogger) -> str:
    """What uploads the files of the run in a folder: a folder for each time that it was begun or
    resumed, the earliest first."""
    kind = "offline-run" if tracker._offline else "run"
    kept = sorted(folder.glob(f"wandb/{kind}-*-{tracker._wandb_init['id']}"))
    online = [] if tracker._offline else ["--include-online"]
    return shlex.join(["wandb", "sync", *online, *map(str, kept)])


def logged_in() -> bool:
    """Whether wandb's login is in .netrc."""
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    return netrc.is_file() and "wandb" in netrc.read_text(encoding="utf-8", errors="ignore")
