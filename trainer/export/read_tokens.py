"""Words in files of other tools: embeddings alone, beside an adapter, and bundled into one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.backbones.word_vectors import vector_names
from trainer.common.left_by_systems import own_files
from trainer.export.bundle import Bundle
from trainer.export.tensor_files import load_tensors
from trainer.ops.adapters.token_rows import known_id

EMBEDDINGS = "embeddings"
CLIPS = ("clip_l", "clip_g")  # the text encoders of SDXL in their order
# the number of the text encoder that a key names
ENCODERS = {"clip_l": 0, "clip_g": 1, "clip_h": 0, "t5": 0, "t5xxl": 0, "gemma": 0}
# keys that do not give the word; the file's name gives it
UNNAMED = ("emb_params", "*", "string_to_param.*")
WORD = "attention_trainer_token"  # the header entry with the word, where the keys name encoders
BUNDLED = re.compile(r"bundle_emb\.(.+?)(?:\.(string_to_param\.\*|[a-z]\w*))?")
OUTPUT = "_out"  # of OneTrainer: a vector that is added to what the text encoder puts out


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds one word: a row or a few under one key that is not a layer's, or rows
    for each text encoder."""
    known = {*ENCODERS, *(f"{key}{OUTPUT}" for key in ENCODERS), "emb_params", "emb_params_out"}
    if tensors and set(tensors) <= known:
        return True
    plain = all("." not in k or k in UNNAMED for k in tensors)
    return len(tensors) == 1 and plain and all(v.ndim <= 2 for v in tensors.values())


def read_tokens(paths: Sequence[Path], base: Any) -> Bundle:
    """The words of files in any of the spellings, see `_words`.

    Raises:
        ValueError: a row's width is not that of the text encoder, or there is no such encoder.
    """
    found = Bundle({}, {})
    for path in paths:
        tensors, metadata = load_tensors(path)
        try:
            found |= _words(tensors, base, word=metadata.get(WORD), fallback=_as_word(path.stem))
        except ValueError as error:
            raise ValueError(f"file={path}: {error}") from None
    return found


def read_beside(path: Path, base: Any) -> Bundle:
    """The words in `embeddings/` of an export's folder, or of the folder that an adapter's file is
    in. Words beside a file that are not the backbone's are left out, with a note."""
    folder = path if path.is_dir() else path.parent
    files = own_files(folder / EMBEDDINGS, ".safetensors")
    if path.is_dir():
        return read_tokens(files, base)
    found = Bundle({}, {})
    for file in files:
        name = f"{EMBEDDINGS}/{file.name}"
        try:
            own = read_tokens([file], base)
        except ValueError as error:
            found = replace(found, notes=(*found.notes, f"{name} beside it is left out: {error}"))
            continue
        note = f"{', '.join((*own.tokens, *own.known))} of {name} beside it is read too"
        found |= replace(own, notes=(note,))
    return found


def bundled(tensors: Mapping[str, Tensor], base: Any) -> tuple[dict[str, Tensor], Bundle]:
    """The tensors of an adapter's file that are no words, and the words that OneTrainer and others
    bundle with them as `bundle_emb.<word>.<encoder>`.

    Raises:
        ValueError: as `read_tokens`.
    """
    rest: dict[str, Tensor] = {}
    words: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := BUNDLED.fullmatch(key):
            words.setdefault(match[1], {})[match[2] or "emb_params"] = value
        else:
            rest[key] = value
    found = Bundle({}, {})
    for word, own in words.items():
        name = _as_word(word)
        try:
            found |= _words(own, base, word=name, fallback=name)
        except ValueError as error:
            raise ValueError(
                f"the file bundles the embedding {word}: {error}. Save it again without bundled "
                "embeddings; the rest can be read"
            ) from None
    return rest, found


def _as_word(name: str) -> str:
    """A word that is called as a file, or as a tool's list has it: <my-cat> for `my cat`."""
    joined = _one_word(name)
    return joined if re.fullmatch(r"\W.*\W", joined) else f"<{joined}>"


def _one_word(name: str) -> str:
    """A name as one word: a prompt's words end at spaces."""
    return "-".join(name.split())


def _words(tensors: Mapping[str, Tensor], base: Any, *, word: str | None, fallback: str) -> Bundle:
    """The word of one file. Several rows become `word`, `word_1`, ..., which one word stands for in
    a prompt. Words that the vocabulary has are the bundle's known ones.

    word: what it is called, None for the name of its key, or `fallback` if that is none.
    """
    encoders = list(base.text_encoders)
    tokens: dict[str, dict[str, Tensor]] = {}
    known: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.endswith(OUTPUT):
            raise ValueError(
                f"{key} is added to the output of the text encoder, which no method here does; "
                "train it without an output embedding"
            )
        number = ENCODERS.get(key, 0)
        if number >= len(encoders):
            raise ValueError(
                f"{key} is for text encoder number {number + 1}, and backbone {base.name} has "
                f"{len(encoders)}; the file was made for another backbone"
            )
        part = encoders[number]
        unnamed = key in ENCODERS or key in UNNAMED
        name = word or (fallback if unnamed else _one_word(key))
        width = base.text_encoders[part].get_input_embeddings().embedding_dim
        if value.shape[-1] != width:
            raise ValueError(
                f"the row of {name} is {value.shape[-1]} wide; the {part} of backbone {base.name} "
                f"has rows of {width}; the file was made for another backbone"
            )
        rows = value.reshape(-1, width)
        for own, row in zip(vector_names(name, len(rows)), rows, strict=True):
            found = known if _knows(base.tokenizers[part], own) else tokens
            found.setdefault(own, {})[part] = row
    return Bundle({}, tokens, known=known)


def _knows(tokenizer: Any, word: str) -> bool:
    try:
        known_id(tokenizer, word)
    except ValueError:
        return False
    return True
