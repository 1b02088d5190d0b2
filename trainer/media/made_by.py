"""What made a picture or clip, said inside its file.

PNG: a text entry `parameters` in the form of the A1111 web UI, which UIs and galleries read, and an
entry `attention_trainer` with the same facts and more as JSON. GIF and MP4: a comment in the form
of `parameters` that has the JSON in its last line. Facts name files without their path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

ENTRY = "attention_trainer"
PARAMETERS = "parameters"
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
    return f"{parameters(facts)}, Attention trainer: {json.dumps(as_json(facts))}"


def as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(dict(facts), sort_keys=True)


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if any(mark in text for mark in ',:\n"') else text
