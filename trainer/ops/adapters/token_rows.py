"""Words of a text encoder that train, new and known ones: an embedding whose table stays frozen and
whose trained rows are parameters of their own.

So the optimiser, the adapter and weight decay see exactly the rows that train.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken

from trainer.common.added_words import single_word


class RowsEmbedding(nn.Module):
    """A frozen table, and `rows`, n of (d,), that are read for ids of their own."""

    def __init__(self, table: Any, rows: Sequence[Tensor]) -> None:
        super().__init__()
        self.table, self.rows = table, nn.ParameterList(rows)

    @property
    def weight(self) -> Tensor:
        """The table with the rows at their ids, (v, d)."""
        raise NotImplementedError

    @property
    def num_embeddings(self) -> int:
        raise NotImplementedError

    @property
    def embedding_dim(self) -> int:
        width: int = self.table.embedding_dim
        return width

    def stacked(self) -> Tensor:
        return torch.stack(list(self.rows))

    def merged(self) -> nn.Embedding:
        """A plain embedding with all rows."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, dtype=self.table.weight.dtype)
        with torch.no_grad():
            plain.weight.copy_(self.weight)
        return plain


class RelearnedEmbedding(RowsEmbedding):
    """Row i is read for `ids[i]` instead of the table's own."""

    row_of: Tensor  # (v,): for each id the number of its row, -1 where the table is read

    def __init__(self, table: Any, ids: Sequence[int], rows: Sequence[Tensor]) -> None:
        super().__init__(table, rows)
        self.ids = tuple(ids)
        row_of = torch.full((table.num_embeddings,), -1)
        row_of[list(ids)] = torch.arange(len(ids))
        self.register_buffer("row_of", row_of, persistent=False)

    @property
    def weight(self) -> Tensor:
        return self._chosen(self.row_of, self.table.weight)

    @property
    def num_embeddings(self) -> int:
        return len(self.row_of)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to embeddings (..., d). The rows take part even where no id is theirs, so that
        every rank of a distributed run has a gradient for them."""
        return self._chosen(self.row_of[ids], self.table(ids))

    def _chosen(self, rows: Tensor, old: Tensor) -> Tensor:
        own = F.embedding(rows.clamp(min=0), self.stacked())
        return torch.where((rows >= 0).unsqueeze(-1), own.to(old.dtype), old)


class ExtendedEmbedding(RowsEmbedding):
    """ids from `first` on read the rows, all others the old table; `first` is the length of the
    tokenizer, and tables of some models have spare rows after it."""

    def __init__(self, table: Any, rows: Sequence[Tensor], first: int | None = None) -> None:
        super().__init__(table, rows)
        self.first: int = table.num_embeddings if first is None else first

    @property
    def ids(self) -> range:
        """Of the rows."""
        return range(self.first, self.first + len(self.rows))

    @property
    def weight(self) -> Tensor:
        old = self.table.weight
        return torch.cat([old[: self.first], self.stacked().to(old), old[self.ids.stop :]])

    @property
    def num_embeddings(self) -> int:
        return max(int(self.table.num_embeddings), self.ids.stop)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to embeddings (..., d). The rows take part even where no id is new, so that
        every rank of a distributed run has a gradient for them."""
        number, last = ids - self.first, len(self.rows) - 1
        new = ((number >= 0) & (number <= last)).unsqueeze(-1)
        added = F.embedding(number.clamp(min=0, max=last), self.stacked())
        old = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        return torch.where(new, added.to(self.table.weight.dtype), old)


def extend(
    encoder: Any, tokenizer: Any, tokens: Sequence[str], words: Sequence[str | None]
) -> list[str]:
    """Adds tokens to a tokenizer and rows to its encoder; each row starts from a word, or as noise
    if the word is None. Returns the rows' parameter names in the order of the tokens.

    Raises:
        ValueError: a token exists already, or a start word is not one token of the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token in vocabulary or f"{token.lower()}</w>" in vocabulary:
            free = next(own for n in count(1) if (own := f"<v{n}>") not in vocabulary)
            raise ValueError(
                f"token {token!r} exists already in the tokenizer; choose another, like {free}"
            )
    table = encoder.get_input_embeddings()
    if isinstance(table, ExtendedEmbedding):
        raise ValueError(
            "the text encoder has new tokens already; name them all in one tokens list, and "
            "continue a run that added some with run.start_from, not as the backbone"
        )
    rows = [_start(table, tokenizer, word=word, seed=seed) for seed, word in enumerate(words)]
    first = len(tokenizer)
    if first > table.num_embeddings:
        raise ValueError(
            f"the tokenizer has {first} tokens and the text encoder {table.num_embeddings}; they "
            "are of different models"
        )
    tokenizer.add_tokens([_added(token) for token in tokens])
    extended = ExtendedEmbedding(table, rows, first)
    encoder.set_input_embeddings(extended)
    return _names(encoder, extended)


def relearn(encoder: Any, tokenizer: Any, words: Sequence[str]) -> list[str]:
    """Gives known words rows of their own, which start as the table's. Returns the rows' parameter
    names in the order of the words. New tokens of the same encoder stay as they are.

    Raises:
        ValueError: a word is not one token of the vocabulary.
    """
    outer = encoder.get_input_embeddings()
    table = outer.table if isinstance(outer, ExtendedEmbedding) else outer
    ids = [known_id(tokenizer, word) for word in words]
    for word, number in zip(words, ids, strict=True):
        if number >= table.num_embeddings:
            raise ValueError(f"word {word!r} is a new token, which trains already")
    if len(set(ids)) != len(ids):
        raise ValueError("a word is named twice; CLIP reads lower case")
    relearned = RelearnedEmbedding(table, ids, [table.weight.detach()[i].clone() for i in ids])
    if table is outer:
        encoder.set_input_embeddings(relearned)
    else:
        outer.table = relearned
    return _names(encoder, relearned)


@contextmanager
def errors_of(part: str, encoders: Collection[str]) -> Iterator[None]:
    """Errors inside the block name the text encoder, where there are several."""
    try:
        yield
    except ValueError as error:
        raise (error if len(encoders) == 1 else ValueError(f"{part}: {error}")) from None


def relearned(encoder: Any) -> RelearnedEmbedding | None:
    """The rows that known words have relearned, beneath new tokens where there are any."""
    outer = encoder.get_input_embeddings()
    found = outer.table if isinstance(outer, ExtendedEmbedding) else outer
    return found if isinstance(found, RelearnedEmbedding) else None


def relearned_words(encoder: Any, tokenizer: Any) -> list[str]:
    """The known words that have rows of their own, in their order."""
    found = relearned(encoder)
    return [tokenizer.decode([number]).strip() for number in found.ids] if found else []


def known_id(tokenizer: Any, word: str) -> int:
    """The id of a word of the vocabulary.

    Raises:
        ValueError: the vocabulary has no such word, or has it as several tokens.
    """
    number = _one_token(tokenizer, word, what="word", example="left")
    if number in (tokenizer.unk_token_id, tokenizer.pad_token_id):
        raise ValueError(f"word {word!r} is not in the vocabulary; new words are new_token's")
    return number


def _names(encoder: nn.Module, embedding: RowsEmbedding) -> list[str]:
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    return [names[id(row)] for row in embedding.rows]


def _one_token(tokenizer: Any, word: str, *, what: str, example: str) -> int:
    """The token of a word inside a text: tokenizers of bytes have another one at its start."""
    inside, ids = (
        tokenizer(text, add_special_tokens=False).input_ids for text in (f" {word}", word)
    )
    if len(inside) == 1:
        ids = inside
    if len(ids) != 1:
        raise ValueError(
            f"{what} {word!r} is {len(ids)} tokens; choose a word that is one, like {example}"
        )
    number: int = ids[0]
    return number


def _added(token: str) -> AddedToken:
    return AddedToken(token, single_word=single_word(token))


def _start(table: nn.Embedding, tokenizer: Any, *, word: str | None, seed: int) -> Tensor:
    weight = table.weight.detach()
    if word is None:
        if weight.stride(0) == 0:  # in a plan all rows are one in memory, of which two tell as much
            weight = weight[:2]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(weight.shape[1], generator=generator).to(weight)
        return weight.mean(0) + weight.std(0) * noise
    return weight[_one_token(tokenizer, word, what="init", example="dog")].clone()
