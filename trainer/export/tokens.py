"""Trained words, one file each in `embeddings/`: `{"<v1>": row}` as diffusers and ComfyUI read it,
with the keys `clip_l` and `clip_g` where there are two text encoders.

A word of the vocabulary whose embedding was trained can be such a file too, for UIs: there the name
of the file, in a prompt, stands for its row. diffusers accepts no word that its tokenizer has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.ops.adapters.token_rows import known_id, relearned_words

EMBEDDINGS = "embeddings"
CLIPS = ("clip_l", "clip_g")  # the text encoders of SDXL in their order
UNNAMED = ("emb_params", "*")  # keys that do not give the word; the file's name gives it
WORD = "attention_trainer_token"  # the header entry with the word, where the keys name encoders


def write_tokens(bundle: Bundle, folder: Path, dtype: torch.dtype, *, known: bool = False) -> None:
    """Writes a file for each new word. Windows allows no `<` and `>` in the names of files, so
    `<v1>` becomes `v1.safetensors`.

    known: also write the words of the vocabulary whose embeddings were trained.

    Raises:
        CannotCarryError: such a word cannot be the name of a file.
    """
    taken: set[str] = set()
    words = bundle.known if known else {}
    if known:
        refuse_unnamable(bundle)
    for word, rows in (*words.items(), *bundle.tokens.items()):
        letters = "".join(letter if letter.isalnum() else " " for letter in word).split()
        name = "-".join(letters) or "token"
        while name.lower() in taken:
            name += "-2"
        taken.add(name.lower())
        tensors = dict(zip(CLIPS, rows.values(), strict=False)) if len(rows) > 1 else {}
        own = tensors or {word: next(iter(rows.values()))}
        path = folder / EMBEDDINGS / f"{name}.safetensors"
        save_tensors(own, path, dtype=dtype, metadata={WORD: word})


def refuse_unnamable(bundle: Bundle) -> None:
    """Raises `CannotCarryError` for a known word that cannot be the name of a file."""
    if unnamable := [word for word in bundle.known if not word.isalnum()]:
        raise CannotCarryError(
            f"the embedding of {unnamable[0]!r} was trained, and UIs find it by the name of its "
            "file, which this word cannot be"
        )


def files(folder: Path) -> list[Path]:
    """The files of words in an export's folder."""
    return sorted((folder / EMBEDDINGS).glob("*.safetensors"))


def load_stock(folder: Path, base: Any) -> None:
    """Loads a folder's words with `load_textual_inversion` of the stock pipeline, which shares its
    parts with `base`."""
    pipeline = base.pipeline()
    if not hasattr(pipeline, "load_textual_inversion"):
        return load_own(folder, base)
    for path in files(folder):
        tensors = load_file(path)
        if set(tensors) <= set(CLIPS):
            word = load_tensors(path)[1][WORD]
            for key, part in zip(CLIPS, base.text_encoders, strict=False):
                pipeline.load_textual_inversion(
                    {word: tensors[key]}, token=word, text_encoder=base.text_encoders[part],
                    tokenizer=base.tokenizers[part],
                )  # fmt: skip
        else:
            pipeline.load_textual_inversion(path.parent, weight_name=path.name)


def token_remark(adapted: Any, *_: Any) -> str | None:
    """How UIs use the embeddings of trained words of the vocabulary; None if there are none."""
    if not (words := known_words(adapted)):
        return None
    return (
        f"the embeddings of these known words were trained: {', '.join(words)}. Copy the files of "
        f"{EMBEDDINGS}/ to the UI's embeddings: UIs of the A1111 family then apply them wherever "
        f"the words occur in a prompt, and in ComfyUI the prompt says `embedding:{words[0]}`"
    )


def known_words(model: Any) -> list[str]:
    """The words of the vocabulary whose embeddings a model has trained, in the first text encoder
    that has any."""
    for part, encoder in model.text_encoders.items():
        if words := relearned_words(encoder, model.tokenizers[part]):
            return words
    return []


def load_own(folder: Path, base: Any) -> None:
    """Adds a folder's words to the base without another tool's code."""
    add_to(base, read_tokens(files(folder), base))


def read_tokens(paths: list[Path], base: Any) -> Bundle:
    """The words of files in any of the spellings. Several rows in one file become `word`, `word_1`,
    ... Words that the vocabulary has are the bundle's known ones.

    Raises:
        ValueError: a row's width is not that of the text encoder.
    """
    tokens: dict[str, dict[str, Tensor]] = {}
    known: dict[str, dict[str, Tensor]] = {}
    for path in paths:
        tensors, metadata = load_tensors(path)
        encoders = list(base.text_encoders)
        if set(tensors) <= set(CLIPS):
            word = metadata.get(WORD, f"<{path.stem}>")
            rows = {part: tensors[key] for key, part in zip(CLIPS, encoders, strict=False)}
        else:
            ((key, row),) = tensors.items()
            word, rows = f"<{path.stem}>" if key in UNNAMED else key, {encoders[0]: row}
        for part, value in rows.items():
            width = base.text_encoders[part].get_input_embeddings().embedding_dim
            if value.shape[-1] != width:
                raise ValueError(
                    f"file={path}: the row of {word} is {value.shape[-1]} wide; the {part} of "
                    f"backbone {base.name} has rows of {width}; the file was made for another "
                    "backbone"
                )
            for number, vector in enumerate(value.reshape(-1, width)):
                name = word if number == 0 else f"{word}_{number}"
                found = known if _knows(base.tokenizers[part], name) else tokens
                found.setdefault(name, {})[part] = vector
    return Bundle({}, tokens, known=known)


def _knows(tokenizer: Any, word: str) -> bool:
    try:
        known_id(tokenizer, word)
    except ValueError:
        return False
    return True


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file holds one word: a row or a few under one key that is not a layer's, or one row
    for each text encoder."""
    if set(tensors) <= set(CLIPS):
        return bool(tensors)
    return len(tensors) == 1 and all("." not in k and v.ndim <= 2 for k, v in tensors.items())
