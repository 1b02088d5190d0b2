"""Words, one file each in `embeddings/`: `{"<v1>": row}` as diffusers and ComfyUI read it, with
`clip_l` and `clip_g` where there are two text encoders.

A known word that has learned anew is such a file, too, for the UIs: what a file is named stands for
its row in a prompt. diffusers takes no word that its tokenizer has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle
from trainer.export.files import load_tensors, save_tensors
from trainer.ops.adapters.token_rows import known_id, relearned_words

EMBEDDINGS = "embeddings"
CLIPS = ("clip_l", "clip_g")  # the text encoders of SDXL in their order
UNNAMED = ("emb_params", "*")  # keys that do not say the word; the file's name does
WORD = "attention_trainer_token"  # the header entry that does, where the keys name encoders


def write_tokens(bundle: Bundle, folder: Path, dtype: torch.dtype, known: bool = False) -> None:
    """`<` and `>` are no letters of a file name on Windows: `<v1>` is in `v1.safetensors`.

    known: write known words that have learned anew, too.

    Raises:
        ValueError: such a word is none that a file can be named.
    """
    taken: set[str] = set()
    words = bundle.known if known else {}
    if unnamable := [word for word in words if not word.isalnum()]:
        raise ValueError(
            f"{unnamable[0]!r} has learned anew, and UIs know such a word by the name of its file, "
            "which it cannot be; format=diffusers and format=merged carry it in the text encoder"
        )
    for word, rows in (*words.items(), *bundle.tokens.items()):
        letters = "".join(letter if letter.isalnum() else " " for letter in word).split()
        name = "-".join(letters) or "token"
        while name.lower() in taken:
            name += "-2"
        taken.add(name.lower())
        tensors = dict(zip(CLIPS, rows.values(), strict=False)) if len(rows) > 1 else {}
        own = tensors or {word: next(iter(rows.values()))}
        save_tensors(own, folder / EMBEDDINGS / f"{name}.safetensors", dtype, {WORD: word})


def files(folder: Path) -> list[Path]:
    return sorted((folder / EMBEDDINGS).glob("*.safetensors"))


def load_stock(folder: Path, base: Any) -> None:
    """Through `load_textual_inversion` of the stock pipeline, which the parts of `base` make up."""
    pipeline = base.pipeline()
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


def token_remark(live: Any, *_: Any) -> str | None:
    """What to tell a UI's user of known words that have learned anew."""
    if not (words := known_words(live)):
        return None
    return (
        f"known words have learned anew ({', '.join(words)}): with {EMBEDDINGS}/ among a UI's "
        "embeddings the A1111 family reads them where they stand in a prompt, and in ComfyUI they "
        f"are written `embedding:{words[0]}`"
    )


def known_words(model: Any) -> list[str]:
    """The words of the vocabulary that a model has learned anew, of its first text encoder with
    any."""
    for part, encoder in model.text_encoders.items():
        if words := relearned_words(encoder, model.tokenizers[part]):
            return words
    return []


def load_own(folder: Path, base: Any) -> None:
    add_to(base, read_tokens(files(folder), base))


def read_tokens(paths: list[Path], base: Any) -> Bundle:
    """The words of files in any of these shapes; several rows under one word are `word`, `word_1`,
    ... Words that the vocabulary has are the bundle's known ones.

    Raises:
        ValueError: a row that is not as wide as the text encoder's.
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
                    f"backbone {base.name} has rows of {width}, so it was made for another"
                )
            for place, vector in enumerate(value.reshape(-1, width)):
                name = word if place == 0 else f"{word}_{place}"
                found = known if _knows(base.tokenizers[part], name) else tokens
                found.setdefault(name, {})[part] = vector
    return Bundle({}, tokens, known)


def _knows(tokenizer: Any, word: str) -> bool:
    try:
        known_id(tokenizer, word)
    except ValueError:
        return False
    return True


def is_embedding(tensors: Mapping[str, Tensor]) -> bool:
    """One row, or few, under one key that is no layer's; or one a text encoder."""
    if set(tensors) <= set(CLIPS):
        return bool(tensors)
    return len(tensors) == 1 and all("." not in k and v.ndim <= 2 for k, v in tensors.items())
