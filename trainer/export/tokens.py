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

from trainer.backbones.word_vectors import first_vectors, following_vectors
from trainer.common.left_by_systems import own_files
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle
from trainer.export.cannot_carry import CannotCarryError
from trainer.export.read_tokens import CLIPS, EMBEDDINGS, WORD, read_tokens
from trainer.export.tensor_files import load_tensors, save_tensors
from trainer.ops.adapters.token_rows import relearned_words


def write_tokens(bundle: Bundle, folder: Path, dtype: torch.dtype, *, known: bool = False) -> None:
    """Writes a file for each new word, with all its vectors: in UIs, one word in a prompt stands
    for the vectors of one file. Windows allows no `<` and `>` in the names of files, so `<v1>`
    becomes `v1.safetensors`.

    known: also write the words of the vocabulary whose embeddings were trained.

    Raises:
        CannotCarryError: such a word cannot be the name of a file.
    """
    taken: set[str] = set()
    words = bundle.known if known else {}
    if known:
        refuse_unnamable(bundle)
    for word, rows in (*words.items(), *_joined(bundle.tokens).items()):
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


def _joined(tokens: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """The words with all their vectors: those of `<v1>` and `<v1>_1`, (d,) each, as (2, d)."""
    found: dict[str, Mapping[str, Tensor]] = {}
    for word in first_vectors(tokens):
        rows = tokens[word]
        vectors = [rows, *(tokens[own] for own in following_vectors(word, tokens))]
        if len(vectors) == 1:
            found[word] = rows
        else:
            found[word] = {part: torch.stack([v[part] for v in vectors]) for part in rows}
    return found


def files(folder: Path) -> list[Path]:
    """The files of words in an export's folder."""
    return own_files(folder / EMBEDDINGS, ".safetensors")


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
