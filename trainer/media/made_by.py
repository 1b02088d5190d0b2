"""What made a picture or clip, said inside its file.

PNG: a text entry `parameters` in the form of the A1111 web UI, which UIs and galleries read, and an
entry `attention_trainer` with the same facts and more as JSON. GIF and MP4: a comment in the form
of `parameters` that has the JSON in its last line; a clip's facts have the hash of its frames
before they were encoded. Facts name files without their path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL.Image import Image
from PIL.Image import open as open_image
from PIL.PngImagePlugin import PngInfo

from trainer.media.images import DAMAGED_IMAGE, ImageError
from trainer.media.read_video import comment_in

ENTRY = "attention_trainer"
PARAMETERS = "parameters"
FRAMES = "frames_sha256"  # the SHA-256 of a clip's frames before they were encoded
LAST = ", Attention trainer: "  # before the JSON in a comment
# facts in the last line of the parameters, by the names that UIs know
NAMES = {
    "steps": "Steps",
    "sampler": "Sampler",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "frames": "Frames",
    "fps": "FPS",
    "backbone": "Model",
    "adapter": "Adapter",
    "adapter_sha256": "Adapter hash",
    "scale": "Adapter scale",
    "strength": "Denoising strength",
    "recipe": "Recipe",
    "run": "Run",
    "step": "Step",
    "version": "Version",
}


def with_facts(image: Image, facts: Mapping[str, Any]) -> Image:
    """The image, with facts that `png_bytes` writes into its file."""
    image.info |= {PARAMETERS: parameters(facts), ENTRY: as_json(facts)}
    return image


def png_bytes(image: Image, more: Mapping[str, str] | None = None) -> bytes:
    """A PNG with the facts of `with_facts`; the same image and facts give the same bytes. more:
    further text entries."""
    entries = PngInfo()
    known = {key: image.info[key] for key in (PARAMETERS, ENTRY) if key in image.info}
    for key, text in (known | dict(more or {})).items():
        entries.add_text(key, text)
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=entries)
    return buffer.getvalue()


def parameters(facts: Mapping[str, Any]) -> str:
    """Facts as the A1111 web UI writes them: the prompt, the negative prompt, a line of values."""
    known = ((name, facts.get(key)) for key, name in NAMES.items())
    values = ", ".join(f"{name}: {_quoted(value)}" for name, value in known if value is not None)
    negative = facts.get("negative")
    lines = [str(facts.get("prompt", ""))]
    lines += [f"Negative prompt: {negative}"] if negative else []
    return "\n".join((*lines, values)).replace("\0", " ")


def comment(facts: Mapping[str, Any]) -> str:
    """Facts in one text, for files that have one comment."""
    return f"{parameters(facts)}{LAST}{json.dumps(as_json(facts))}"


def as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(dict(facts), sort_keys=True)


def facts_in(path: Path) -> dict[str, Any]:
    """The facts in the file of a picture (PNG) or a clip (GIF or MP4).

    Raises:
        ImageError: there is no such file, it is damaged, or nothing in it says what made it.
        ModuleNotFoundError: it is an MP4, and PyAV is not installed.
    """
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    if is_mp4(path):
        info: dict[Any, Any] = {"comment": comment_in(path)}
    else:
        info = _info_of_image(path)
    text = info.get(ENTRY) or _json_of(info.get("comment", b""))
    try:
        facts = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        facts = None
    if not isinstance(facts, dict) or "prompt" not in facts:
        raise ImageError(
            f"{path}: nothing in it says what made it; only pictures of `sample` do, as it wrote "
            "them (programs that edit or send pictures often remove that)"
        )
    return facts


def is_mp4(path: Path) -> bool:
    """By its first bytes, as of any name."""
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _info_of_image(path: Path) -> dict[Any, Any]:
    try:
        with open_image(path, formats=("PNG", "GIF")) as image:
            return dict(image.info)
    except DAMAGED_IMAGE:
        raise ImageError(f"{path}: not a readable PNG, GIF or MP4") from None


def _json_of(said: Any) -> str | None:
    """The JSON in the comment of a clip; the prompt before it may hold the same words."""
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
    places = [found.end() for found in re.finditer(re.escape(LAST), text)]
    for place in places:
        with suppress(ValueError, RecursionError):
            found = json.loads(text[place:])
            return found if isinstance(found, str) else None
    return None


def _quoted(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(mark in text for mark in ',:\n"') else text
