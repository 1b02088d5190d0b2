"""How a backbone reads a prompt, from the files of its tokenizer: which tokens it has and how many
of them count. Importing this imports neither torch nor transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.backbones.class_names import class_names
from trainer.backbones.families import find_family
from trainer.backbones.family import tokenizer_name
from trainer.backbones.folder_facts import file_of_part, read_part
from trainer.backbones.prompt_reader import PromptReader, length_in
from trainer.backbones.word_vectors import with_all_vectors
from trainer.common.added_words import single_word

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from trainer.backbones.spec import BackboneSpec

# how CLIP divides a text into words, as transformers has it
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


def lower_but(prompt: str, added: Collection[str]) -> str:
    """A prompt in lower case but for added words, with single spaces."""
    text = " ".join(prompt.split())
    if not added:
        return text.lower()
    names = "|".join(re.escape(word) for word in sorted(added, key=len, reverse=True))
    parts = re.split(f"({names})", text)
    return "".join(part if number % 2 else part.lower() for number, part in enumerate(parts))


def prompt_reader(
    spec: BackboneSpec, words: Sequence[str] = (), *, library: bool = False
) -> PromptReader | None:
    """How the backbone of a folder reads prompts after `words` were added to its vocabulary; None
    where the folder is not on this machine or has a tokenizer that cannot be read. library: ask
    transformers too, which imports torch, for a tokenizer that only it reads, as a `spiece.model`.
    """
    family = find_family(spec.family)
    if not family.text_encoders:
        names = class_names(spec, family.denoiser)
        return None if names is None else names.reader
    tokenizer, length = _tokenizer(spec, library=library), prompt_length(spec)
    if tokenizer is None or length is None:
        return None
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(word, single_word=single_word(word)) for word in words])
    nothing = "" if family.template is None else family.template.around("")
    chunk = length - len(tokenizer.encode(nothing).ids)
    added = {str(token.content) for token in tokenizer.get_added_tokens_decoder().values()}

    def ids(text: str) -> Sequence[int]:
        text = with_all_vectors(text, added)
        own = lower_but(text, added) if family.lower_case else text
        found: Sequence[int] = tokenizer.encode(own, add_special_tokens=False).ids
        return found

    return PromptReader(ids, spec.max_tokens or chunk, chunk=chunk, added=frozenset(words))


def prompt_length(spec: BackboneSpec) -> int | None:
    """Tokens that one call of the text encoder takes, those of begin and end included."""
    part = _reader(spec)
    own = read_part(spec, f"{tokenizer_name(part)}/tokenizer_config.json")
    encoder = read_part(spec, f"{part}/config.json")
    index = read_part(spec, "model_index.json")
    if own is None or encoder is None or index is None:
        return None
    pipeline = str(index.get("_class_name"))
    lengths = [
        own.get("model_max_length"),
        find_family(spec.family).prompt_lengths.get(pipeline),
        encoder.get("max_position_embeddings") if _is_clip(encoder) else None,
    ]
    return min(filter(None, map(length_in, lengths)), default=None)


def _reader(spec: BackboneSpec) -> str:
    """The text encoder whose tokens the denoiser gets."""
    return find_family(spec.family).reader or "text_encoder"


def _is_clip(encoder: dict[str, Any]) -> bool:
    return str(encoder.get("model_type")).startswith("clip")


def check_max_tokens(spec: BackboneSpec) -> None:
    """Raises ValueError where the text encoder does not divide prompts of `spec.max_tokens`, or
    there is none."""
    if spec.max_tokens and not find_family(spec.family).text_encoders:
        raise ValueError(
            f"text.max_tokens={spec.max_tokens}: this backbone has no text encoder; leave it out"
        )
    reader, encoder = prompt_reader(spec), read_part(spec, f"{_reader(spec)}/config.json")
    if spec.max_tokens and reader and encoder and _is_clip(encoder):
        check_parts(spec.max_tokens, reader.chunk)


def check_parts(most: int, chunk: int) -> None:
    """Raises ValueError unless so many tokens are parts of `chunk`."""
    if most % chunk:
        raise ValueError(
            f"text.max_tokens={most}: this text encoder reads parts of {chunk} tokens; give a "
            f"multiple, as in text.max_tokens={-(-most // chunk) * chunk}"
        )


def vocabulary(spec: BackboneSpec) -> Collection[str]:
    """All tokens of the backbone's folder; empty where they cannot be read here."""
    tokenizer = _tokenizer(spec)
    return () if tokenizer is None else tokenizer.get_vocab(with_added_tokens=True).keys()


def _tokenizer(spec: BackboneSpec, *, library: bool = False) -> Tokenizer | None:
    config = file_of_part(spec, f"{tokenizer_name(_reader(spec))}/tokenizer_config.json")
    if spec.folder is None or config is None:
        return None
    try:
        found = _read(config.parent)
        return _read_by_library(config.parent) if found is None and library else found
    except Exception:  # tokenizers raises bare ones; loading says what is wrong with the files
        return None


def _read(folder: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    if (folder / "tokenizer.json").is_file():
        found = Tokenizer.from_str(_text(folder / "tokenizer.json"))
        found.no_truncation()
        found.no_padding()
        return found
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _clip(json.loads(_text(folder / "vocab.json")), folder)
    return None


def _read_by_library(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    found: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Tokenizer.from_str(found.backend_tokenizer.to_str())


def _clip(vocab: dict[str, int], folder: Path) -> Tokenizer:
    """CLIP's tokenizer of its two older files, as transformers makes it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    lines = _text(folder / "merges.txt").split("\n")[1:]
    merges = [(pair[0], pair[1]) for line in lines if len(pair := line.split()) == 2]
    ends = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    found = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<|endoftext|>", **ends))
    found.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    begin, end = "<|startoftext|>", "<|endoftext|>"
    found.post_processor = processors.RobertaProcessing((end, vocab[end]), (begin, vocab[begin]))
    found.add_special_tokens([begin, end])
    more = folder / "added_tokens.json"
    known: Any = json.loads(_text(more)) if more.is_file() else {}
    found.add_tokens([str(word) for word in known])
    return found


@lru_cache(maxsize=16)
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")
