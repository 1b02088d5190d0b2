"""The command line: verbs and `key=value` words. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import gc
import sys

from trainer.cli.usage import LIGHT_VERBS, VERBS, no_verb, verb_module
from trainer.common.exit_codes import BAD_RECIPE, report
from trainer.common.program import as_started
from trainer.common.spinning import watched
from trainer.common.threads import limit_threads, return_to_all


def main(words: list[str]) -> int:
    """Runs a verb and returns the exit code; a mistake of the user's is one line on stderr."""
    verb, *rest = words or ["help"]
    if verb in ("-V", "--version", "version"):
        return _version()
    if verb in ("-h", "--help"):
        verb, rest = "help", []
    elif any(word in ("-h", "--help") for word in rest):
        named = [word for word in rest if word.isidentifier()][:1] if verb == "data" else []
        verb, rest = "help", [verb, *named]
    if verb not in VERBS:
        print(as_started(no_verb(verb)), end="", file=sys.stderr)
        return BAD_RECIPE
    try:
        code = _run(verb, rest)
        sys.stdout.flush()
        return code
    except BaseException as error:
        ended = report(error)
        if ended is None:
            raise
        return ended


def _version() -> int:
    from trainer.common.version import versions

    print("\n".join(versions()))
    return 0


def _run(verb: str, words: list[str]) -> int:
    if verb in (*LIGHT_VERBS, "report"):  # they import no torch: there are no threads to limit
        return int(verb_module(verb).run(words))
    return_to_all()
    limit_threads()
    with watched():
        return int(verb_module(verb).run(words))


def run_program() -> None:
    """The whole process: what `python -m trainer` and the script `attention-trainer` run."""
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        gc.freeze()  # spares the seconds that collecting all objects at exit would take


if __name__ == "__main__":
    run_program()
