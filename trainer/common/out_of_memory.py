"""What a user can do when a device or the machine has no memory left."""

from __future__ import annotations

# torch: on Linux, on Windows, and of Apple's GPUs
SAID = ("can't allocate memory", "not enough memory", "MPS backend out of memory")
ADVICE = (
    "A training run needs less with a smaller run.batch_size and a larger run.accumulate, with "
    "run.gradient_checkpointing=true, run.precision=bf16 or a smaller run.resolution; other verbs "
    "with precision=bf16. `check plan=true` estimates what a run needs. The same command resumes "
    "from the last checkpoint"
)


def out_of_memory(error: BaseException) -> str | None:
    """What to tell the user of an error that is about memory; None for any other. torch's own class
    is known by its name, so that torch need not be imported."""
    lines = str(error).splitlines() or [""]
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    if not (named or isinstance(error, MemoryError) or any(text in lines[0] for text in SAID)):
        return None
    return f"out of memory: {lines[0] or type(error).__name__}. {ADVICE}"
