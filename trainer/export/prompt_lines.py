"""The lines of a README's python call that give the pipeline its prompts. Prompts that were read in
parts in training, see `backbones/long_prompts.py`, are read so there too: a stock pipeline would
cut them off behind the first part."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

MASK = "prompt_attention_mask"  # what pipelines call it whose networks do not attend to padding


def prompt_text(base: Any, called: bool) -> str | None:
    """For people: how long prompts were read in training; None where as by every reader. called:
    whether a python call is printed below."""
    hint, parts = prompt_hint(base), base.prompts.parts
    if hint is None or parts == 1:
        return hint and f"{hint}."
    here = " The call below reads them so." if called else ""
    return (
        f"{hint}. A1111's web UI, Forge and ComfyUI read long prompts so; other readers cut them "
        f"off behind the first part.{here} In training a short prompt had {parts} parts too, the "
        "last of them empty, which UIs leave out."
    )


def prompt_hint(base: Any) -> str | None:
    """How long prompts were read in training, in one sentence without its stop."""
    most, parts = base.max_tokens, base.prompts.parts
    if most is None:
        return None
    read = f", in parts of {most // parts} that have a begin and an end each" if parts > 1 else ""
    return f"Trained with prompts of up to {most} tokens{read}"


def prompt_entries(base: Any) -> dict[str, str]:
    """The same for headers of files, under the names of sd-scripts and ModelSpec."""
    hint = prompt_hint(base)
    if hint is None:
        return {}
    return {"ss_max_token_length": str(base.max_tokens), "modelspec.usage_hint": hint}


def encoding(base: Any) -> Iterator[str]:
    """A function that reads a prompt in parts; no lines where a prompt has one."""
    if base.prompts.parts == 1:
        return
    masked = MASK in _options(base)
    yield f"""
def encode(text):  # in {base.prompts.parts} parts, as in training
    tokenizer = pipe.tokenizer"""
    if hasattr(base.pipeline(), "maybe_convert_prompt"):
        yield "    text = pipe.maybe_convert_prompt(text, tokenizer)  # a word of several vectors"
    if base.declared.lower_case:
        yield "    text = text.lower()"
    chunk = base.max_tokens // base.prompts.parts
    given = "found.input_ids.to(device)"
    given += ", attention_mask=found.attention_mask.to(device)" if masked else ""
    yield f"""    ids = tokenizer(text, add_special_tokens=False).input_ids
    parts = [ids[n * {chunk} : (n + 1) * {chunk}] for n in range({base.prompts.parts})]
    rows = [[tokenizer.bos_token_id, *part, tokenizer.eos_token_id] for part in parts]
    found = tokenizer.pad(
        {{"input_ids": rows}}, padding="max_length", max_length={chunk + 2}, return_tensors="pt"
    )
    hidden = pipe.text_encoder({given})[0].flatten(0, 1)[None]
    return hidden{", found.attention_mask.flatten()[None].to(device)" if masked else ""}

"""


def prompt_arguments(prompt: str, base: Any) -> str:
    """The arguments of the pipeline that stand for a prompt, and the empty one beside it."""
    if base.prompts.parts == 1:
        return repr(prompt)
    if MASK not in _options(base):
        return f'prompt_embeds=encode({prompt!r}), negative_prompt_embeds=encode("")'
    return "**prompts"


def prompts_before(prompt: str, base: Any) -> Iterator[str]:
    """Lines before the call, where its arguments are not written in place."""
    if base.prompts.parts > 1 and MASK in _options(base):
        yield "prompts = dict(negative_prompt=None)"
        for name, text in (("", prompt), ("negative_", "")):
            yield f"prompts['{name}prompt_embeds'], prompts['{name}{MASK}'] = encode({text!r})"


def _options(base: Any) -> frozenset[str]:
    return frozenset(inspect.signature(type(base.pipeline()).__call__).parameters)
