"""New words in a text encoder: an embedding whose old table stays frozen and whose new rows are
parameters of their own.

So the optimiser, the adapter and weight decay see exactly the rows that train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken


class ExtendedEmbedding(nn.Module):
    """ids below `len(table)` read the old table, those above read `rows`, n of (d,)."""

    def __init__(self, table: nn.Embedding, rows: Sequence[Tensor]) -> None:
        super().__init__()
        self.table, self.rows = table, nn.ParameterList(rows)

    @property
    def weight(self) -> Tensor:
        """Old and new rows as one table (v + n, d)."""
        return torch.cat([self.table.weight, self._stacked().to(self.table.weight)])

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings + len(self.rows)

    @property
    def embedding_dim(self) -> int:
        return self.table.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) to embeddings (..., d). The rows take part even where no id is new, so that
        every rank of a distributed run has a gradient for them."""
        old = self.table.num_embeddings
        new = (ids >= old).unsqueeze(-1)
        added = F.embedding((ids - old).clamp(min=0), self._stacked())
        return torch.where(
            new, added.to(self.table.weight.dtype), self.table(ids.clamp(max=old - 1))
        )

    def _stacked(self) -> Tensor:
        return torch.stack(list(self.rows))

    def merged(self) -> nn.Embedding:
        """A plain embedding with all rows."""
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, dtype=self.table.weight.dtype)
        with torch.no_grad():
            plain.weight.copy_(self.weight)
        return plain


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
            raise ValueError(
                f"token {token!r} exists already in the tokenizer; choose another, like <v1>"
            )
    table = encoder.get_input_embeddings()
    if isinstance(table, ExtendedEmbedding):
        raise ValueError(
            "the text encoder has new tokens already; name them all in one tokens list"
        )
    rows = [_start(table, tokenizer, word, place) for place, word in enumerate(words)]
    first = len(tokenizer)
    if first != table.num_embeddings:
        raise ValueError(
            f"the tokenizer has {first} tokens and the text encoder {table.num_embeddings}; they "
            "must agree"
        )
    tokenizer.add_tokens([_added(token) for token in tokens])
    extended = ExtendedEmbedding(table, rows)
    encoder.set_input_embeddings(extended)
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    return [names[id(row)] for row in extended.rows]


def _added(token: str) -> AddedToken:
    """A token like `sks` must not cut `asks`; one like `<v1>` is met wherever it stands."""
    return AddedToken(token, single_word=token[0].isalnum() or token[-1].isalnum())


def _start(table: nn.Embedding, tokenizer: Any, word: str | None, place: int) -> Tensor:
    weight = table.weight.detach()
    if word is None:
        generator = torch.Generator().manual_seed(place)
        noise = torch.randn(weight.shape[1], generator=generator).to(weight)
        return weight.mean(0) + weight.std(0) * noise
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"init {word!r} is {len(ids)} tokens; choose a word that is one, like dog")
    return weight[ids[0]].clone()
