"""The command line: verbs and `key=value` words. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import gc
import sys

from trainer.cli.usage import VERBS, no_verb, verb_module
from trainer.common.exit_codes import BAD_RECIPE, report
from trainer.common.spinning import watched
from trainer.common.threads import limit_threads, return_to_all


def main(words: list[str]) -> int:
    """Runs a verb and returns the exit code; a mistake of the user's is one line on stderr."""
    verb, *rest = words or ["help"]
    if verb in ("-h", "--help"):
        verb, rest = "help", []
    elif any(word in ("-h", "--help") for word in rest):
        named = [word for word in rest if word.isidentifier()][:1] if verb == "data" else []
        verb, rest = "help", [verb, *named]
    if verb not in VERBS:
        print(no_verb(verb), end="", file=sys.stderr)
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


def _run(verb: str, words: list[str]) -> int:
    if verb in ("help", "list"):  # they import no torch, so there are no threads to limit
        return int(verb_module(verb).run(words))
    return_to_all()
    limit_threads()
    with watched():
        return int(verb_module(verb).run(words))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        gc.freeze()  # spares the seconds that collecting all objects at exit would take
