"""`sample`: generates pictures or clips with an adapter or a backbone."""

from __future__ import annotations

import sys
from pathlib import Path

from trainer.cli.options import build_options, given_by, quiet_libraries
from trainer.cli.repeat_picture import RepeatedPicture, as_then, compared, read_picture
from trainer.cli.sample_files import written
from trainer.cli.sample_job import job_of
from trainer.cli.sample_options import SampleOptions
from trainer.cli.sample_partners import refuse_idle_options
from trainer.config import load as recipes
from trainer.config.partners import idle_of_methods, refuse_idle


def run(words: list[str]) -> int:
    given = given_by([_renamed(word) for word in words], SampleOptions)
    given = {key: value for key, value in given.items() if value not in (None, "")}
    picture: RepeatedPicture | None = None
    if given.get("from") is not None:
        given, picture = read_picture(Path(str(given.pop("from"))), given)
    options = build_options(given, SampleOptions)
    if picture is None:
        refuse_idle_options(given)
    bare = options.methods and not options.adapters
    chosen = recipes.methods_of(options.methods) if bare else {}
    refuse_idle(idle_of_methods(chosen), {"methods": options.methods or {}} if bare else {})
    quiet_libraries()
    found = []
    with as_then(picture):
        backbone, job = job_of(options, chosen, picture)
        for path in written(backbone, job):
            print(path)
            found.append(path)
    if {path.suffix for path in found} == {".gif"}:
        print("no MP4 beside it: PyAV writes one, pip install 'av>=18'", file=sys.stderr)
    if picture is not None and picture.exactly:
        print(compared(picture, found), file=sys.stderr)
    return 0


def _renamed(word: str) -> str:
    """A word with the present name of its key."""
    return f"size={word.removeprefix('resolution=')}" if word.startswith("resolution=") else word
