"""Known words: their rows and nothing else, beside new tokens, and in a whole pipeline of stock."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.methods.apply import Plan, apply_methods

WITH, WITHOUT = "a fox left of a cat", "a penguin above a cat"
BOTH = {
    "word_embedding": {"tokens": ["left", "fox"]},
    "new_token": {"tokens": ["<v1>"], "init": "fox"},
}


def relearn(backbone: Any, *words: str) -> Plan:
    return apply_methods(backbone, methods_of({"word_embedding": {"tokens": words}}))


def encoded(backbone: Any, prompt: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = backbone.encode_prompts([prompt]).tokens
    return found


def shift(backbone: Any, plan: Plan) -> None:
    own = dict(backbone.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            own[name].add_(1.0)


def test_only_its_rows_train_and_only_its_words_change(
    tiny: Any, train: Callable[..., list[float]]
) -> None:
    before = {prompt: encoded(tiny, prompt) for prompt in (WITH, WITHOUT)}
    table = tiny.text_encoder.get_input_embeddings().weight.detach().clone()
    plan = relearn(tiny, "left", "Fox")
    assert [name.rpartition("token_embedding.")[2] for name in plan.names] == ["rows.0", "rows.1"]
    assert plan.trained == 256
    assert all(torch.equal(encoded(tiny, prompt), state) for prompt, state in before.items())
    train(tiny, plan)
    after = tiny.text_encoder.get_input_embeddings().weight.detach()
    ids = tiny.tokenizer.convert_tokens_to_ids(["left</w>", "fox</w>"])
    assert (after != table).any(1).nonzero().flatten().tolist() == sorted(ids)
    assert torch.equal(encoded(tiny, WITHOUT), before[WITHOUT])
    assert not torch.equal(encoded(tiny, WITH), before[WITH])


@pytest.mark.parametrize("order", [tuple(BOTH), tuple(reversed(BOTH))], ids=["first", "second"])
def test_beside_new_tokens(order: tuple[str, ...], tiny: Any) -> None:
    before = encoded(tiny, WITH)
    plan = apply_methods(tiny, methods_of({name: BOTH[name] for name in order}))
    assert [name.rpartition("token_embedding.")[2] for name in plan.names] == [
        "rows.0", "table.rows.0", "table.rows.1",
    ]  # fmt: skip
    assert torch.equal(encoded(tiny, "a <v1> left of a cat"), before)
    own = dict(tiny.named_parameters())
    with torch.no_grad():
        own[plan.edits["new_token"].trains[0]].add_(1.0)
    assert torch.equal(encoded(tiny, WITH), before)
    with torch.no_grad():
        for name in plan.edits["word_embedding"].trains:
            own[name].add_(1.0)
    assert not torch.equal(encoded(tiny, WITH), before)


def test_a_stock_pipeline_reads_them(tiny: Any, tmp_path: Path) -> None:
    from transformers import CLIPTextModel

    from trainer.export.formats.merged import merge

    shift(tiny, relearn(tiny, "left", "fox"))
    wanted = encoded(tiny, WITH)
    merge(tiny).text_encoder.save_pretrained(tmp_path)
    loaded = CLIPTextModel.from_pretrained(tmp_path).eval()
    ids = tiny.tokens([WITH]).input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], wanted)


def test_what_an_adapter_adds_holds_them(tiny: Any, open_folder: Any, tiny_folder: Path) -> None:
    from trainer.export.apply_bundle import add_to
    from trainer.export.extract import extract

    plan = apply_methods(tiny, methods_of(BOTH))
    own = dict(tiny.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            own[name].add_(1.0)
    bundle = extract(tiny, open_folder(tiny_folder), plan.stored)
    assert not bundle.dropped
    assert {word: list(rows) for word, rows in bundle.known.items()} == {
        "left": ["text_encoder"], "fox": ["text_encoder"]
    }  # fmt: skip
    plain = add_to(open_folder(tiny_folder), bundle)
    for prompt in (WITH, "a <v1> left of a cat"):
        assert torch.equal(encoded(plain, prompt), encoded(tiny, prompt))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"word_embedding": {"tokens": ["helicoptery"]}}, "helicoptery"),
        ({"word_embedding": {"tokens": ["left", "LEFT"]}}, "named twice"),
        ({"word_embedding": {"tokens": []}}, "at least 1"),
        ({"word_embedding": {"tokens": ["left of"]}}, "no single word"),
        (
            {"new_token": {"tokens": ["<v1>"]}, "word_embedding": {"tokens": ["<v1>"]}},
            "'<v1>' is a new token, which trains already",
        ),
        (
            {"word_embedding": {"tokens": ["left"]}, "full": {"text_encoder": True}},
            r"word_embedding and methods\.full both claim",
        ),
    ],
)
def test_what_cannot_be_is_refused(tree: dict[str, Any], message: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=message):
        apply_methods(tiny, methods_of(tree))
