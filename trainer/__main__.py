"""The command line: verbs and `key=value` words. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import gc
import os
import sys

from trainer.cli.usage import VERBS, usage, verb_module
from trainer.common.exit_codes import BAD_RECIPE, DISK, INTERRUPTED, LeaveError
from trainer.common.out_of_memory import out_of_memory
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
        return _no_verb(verb)
    try:
        code = _run(verb, rest)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except LeaveError as leaving:
        if leaving.code:  # a rank that another has started says nothing
            print(leaving, file=sys.stderr)
        return leaving.code
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        import errno

        print(f"error: {error}", file=sys.stderr)
        return DISK if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else 1
    except (ValueError, ModuleNotFoundError) as error:
        # what a user can fix; anything else is a fault of ours and keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return BAD_RECIPE
    except (RuntimeError, MemoryError) as error:
        text = out_of_memory(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        return 1


def _run(verb: str, words: list[str]) -> int:
    if verb in ("help", "list"):  # they import no torch, so there are no threads to limit
        return int(verb_module(verb).run(words))
    return_to_all()
    limit_threads()
    with watched():
        return int(verb_module(verb).run(words))


def _no_verb(verb: str) -> int:
    import difflib

    near = difflib.get_close_matches(verb, VERBS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    print(f"error: no verb is called {verb!r}{hint}\n{usage()}", end="", file=sys.stderr)
    return BAD_RECIPE


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        gc.freeze()  # spares the seconds that collecting all objects at exit would take
