"""The lines of a README's python call that give the pipeline its prompts. Prompts that were read in
parts in training, see `backbones/long_prompts.py`, are read so there too: a stock pipeline would
cut them off behind the first part."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "prompt_attention_mask"  # what pipelines call it whose networks do not attend to padding


def prompt_text(base: Any, called: bool) -> str | None:
    """For people: how long prompts were read in training; None where text.max_tokens is not given.
    called: whether a python call is printed below."""
    hint, parts = prompt_hint(base), base.prompts.parts
    if hint is None or parts == 1:
        return hint and f"{hint}."
    here = " The call below reads them so." if called and not _several(base) else ""
    return (
        f"{hint}. A1111's web UI, Forge and ComfyUI read long prompts so; other readers cut them "
        f"off behind the first part.{here} In training every prompt had {parts} parts: a short one "
        "was filled up with empty parts, which UIs leave out."
    )


def prompt_hint(base: Any) -> str | None:
    """How long prompts were read in training, one sentence, without the full stop."""
    most, parts = base.max_tokens, base.prompts.parts
    if most is None:
        return None
    chunk = base.prompts.reader.chunk
    read = f", in parts of {chunk} that have a begin and an end each" if parts > 1 else ""
    return f"Trained with prompts of up to {most} tokens{read}"


def prompt_entries(base: Any) -> dict[str, str]:
    """The same for headers of files, under the names of sd-scripts and ModelSpec."""
    hint = prompt_hint(base)
    if hint is None:
        return {}
    return {"ss_max_token_length": str(base.max_tokens), "modelspec.usage_hint": hint}


def prompt_code(prompt: str, base: Any) -> tuple[list[str], str]:
    """Lines before the call of the pipeline, and its arguments that stand for a prompt and the
    empty one beside it. A backbone that reads no text is called with one of its classes."""
    if not base.text_encoders:
        return ["# the number of a class; pipe.labels has their names"], "class_labels=[0]"
    if base.prompts.parts == 1 or _several(base):
        first = next(name for name in call_options(base) if name != "self")
        return [], repr(prompt) if first == "prompt" else f"prompt={prompt!r}"
    masked = MASK in call_options(base)
    lines = list(_encode(base, masked))
    if not masked:
        return lines, f'prompt_embeds=encode({prompt!r}), negative_prompt_embeds=encode("")'
    lines.append("prompts = dict(negative_prompt=None)")
    for name, text in (("", prompt), ("negative_", "")):
        lines.append(f"prompts['{name}prompt_embeds'], prompts['{name}{MASK}'] = encode({text!r})")
    return lines, "**prompts"


def _encode(base: Any, masked: bool) -> Iterator[str]:
    """A function that reads a prompt in parts. masked: it gives the mask of attention, too."""
    chunk, parts = base.prompts.reader.chunk, base.prompts.parts
    yield f"""
def encode(text):  # in {parts} parts, as in training
    tokenizer = pipe.tokenizer"""
    if hasattr(base.pipeline(), "maybe_convert_prompt"):
        yield "    text = pipe.maybe_convert_prompt(text, tokenizer)  # a word of several vectors"
    given = "found.input_ids.to(device)"
    given += ", attention_mask=found.attention_mask.to(device)" if masked else ""
    yield f"""    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = [ids[n * {chunk} : (n + 1) * {chunk}] for n in range({parts})]
    rows = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
    found = tokenizer.pad(
        {{"input_ids": rows}}, padding="max_length", max_length={chunk + 2}, return_tensors="pt"
    )
    hidden = pipe.text_encoder({given})[0].flatten(0, 1)[None]
    return hidden{", found.attention_mask.flatten()[None].to(device)" if masked else ""}

"""


def _several(base: Any) -> bool:
    """Whether prompts are read by several text encoders: their call has no lines here."""
    return len(base.text_encoders) > 1


def call_options(base: Any) -> tuple[str, ...]:
    """The arguments that the stock pipeline of a backbone takes, in their order."""
    return tuple(_parameters(base))


def guides_beside_negative(base: Any) -> bool:
    """Whether the stock pipeline of a backbone guides, but only where it has a negative prompt, be
    it an empty one."""
    scale = _parameters(base).get("true_cfg_scale")
    return scale is not None and scale.default > 1


def _parameters(base: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(base.pipeline()).__call__).parameters
