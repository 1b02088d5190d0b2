"""New tokens: their rows and nothing else, a tokeniser that knows them, old prompts untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.methods.apply import Plan, apply_methods
from trainer.methods.weight.new_token import NewToken

OLD_PROMPTS = ["a fox on a red background", "", "a cat left of an apple, a penguin below it"]


def add(backbone: Any, *tokens: str, init: Any = "fox") -> Plan:
    return apply_methods(backbone, {"new_token": NewToken(tokens=tokens or ("<v1>",), init=init)})


def encoded(backbone: Any, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        found: Tensor = backbone.encode_prompts(prompts).tokens
    return found


def pieces(backbone: Any, text: str) -> list[str]:
    return list(backbone.tokenizer.tokenize(text))


def table(backbone: Any) -> Any:
    return backbone.text_encoder.get_input_embeddings()


def test_trains_only_the_rows(tiny: Any) -> None:
    plan = add(tiny)
    (name,) = plan.names
    assert name.startswith("text_encoder.")
    assert name.endswith("token_embedding.rows.0")
    assert dict(tiny.named_parameters())[name].shape == (128,)
    assert plan.trained == 128


def test_old_rows_stay_through_training(tiny: Any, train: Callable[..., list[float]]) -> None:
    before = table(tiny).weight.detach().clone()
    size = len(before)
    plan = add(tiny)
    train(tiny, plan)
    after = table(tiny).weight.detach()
    assert torch.equal(after[:size], before)
    start = before[tiny.tokenizer.convert_tokens_to_ids("fox</w>")]
    assert not torch.equal(after[size], start)


def test_the_tokeniser_gives_the_new_id(tiny: Any) -> None:
    size = len(tiny.tokenizer)
    around = [*pieces(tiny, "a"), "<v1>", *pieces(tiny, "on a red background")]
    add(tiny)
    assert tiny.tokenizer.convert_tokens_to_ids("<v1>") == size == len(tiny.tokenizer) - 1
    assert pieces(tiny, "a <v1> on a red background") == around


@pytest.mark.parametrize(
    "text",
    ["a<v1>on", "<v1>", "a <v1>, a fox", "<v1> <v1>"],
    ids=["tight", "bare", "comma", "twice"],
)
def test_the_token_is_met_wherever_it_stands(text: str, tiny: Any) -> None:
    add(tiny)
    assert pieces(tiny, text).count("<v1>") == text.count("<v1>")


@pytest.mark.parametrize("token", ["<v1>", "sks", "oun", "<new-1>"])
def test_other_words_keep_their_pieces(token: str, tiny: Any) -> None:
    """A token that happens to stand inside another word must not cut that word."""
    texts = [*OLD_PROMPTS, "he asks for a tusks museum", "around the hounds", "v1 < v1 new-1"]
    before = [pieces(tiny, text) for text in texts]
    add(tiny, token)
    assert [pieces(tiny, text) for text in texts] == before


def test_old_prompts_encode_bit_for_bit(tiny: Any) -> None:
    before = encoded(tiny, OLD_PROMPTS)
    add(tiny)
    assert torch.equal(encoded(tiny, OLD_PROMPTS), before)


def test_it_starts_as_its_word(tiny: Any) -> None:
    fox = encoded(tiny, ["a fox on a red background"])
    add(tiny)
    assert torch.equal(encoded(tiny, ["a <v1> on a red background"]), fox)


def test_several_tokens_each_with_its_word(tiny: Any) -> None:
    wanted = encoded(tiny, ["a fox left of a cat", "a cat left of a fox"])
    plan = add(tiny, "<v1>", "<v2>", init=("fox", "cat"))
    assert plan.trained == 256
    found = encoded(tiny, ["a <v1> left of a <v2>", "a <v2> left of a <v1>"])
    assert torch.equal(found, wanted)


def test_only_the_token_of_the_task_trains(tiny: Any) -> None:
    """Of three words, in the second task: the first is kept, the third does not exist yet."""
    method = NewToken(tokens=("<v1>", "<v2>", "<v3>"), init=("fox", "cat", "dog"), task=1)
    assert method.words == ("<v1>", "<v2>")
    old = table(tiny).weight.detach().clone()
    plan = apply_methods(tiny, {"new_token": method})
    assert [name.rpartition(".")[2] for name in plan.names] == ["1"]
    assert [name.rpartition(".")[2] for name in plan.keeps] == ["0"]
    assert len(table(tiny).rows) == 2
    for row, word in zip(table(tiny).rows, ("fox", "cat"), strict=True):
        assert torch.equal(row, old[tiny.tokenizer.convert_tokens_to_ids(f"{word}</w>")])
    assert "<v3>" not in tiny.tokenizer.get_vocab()


def test_noise_has_the_spread_of_the_table_and_differs(tiny: Any) -> None:
    old = table(tiny).weight.detach().clone()
    add(tiny, "<v1>", "<v2>", init=None)
    rows = torch.stack(list(table(tiny).rows)).detach()
    assert not torch.equal(rows[0], rows[1])
    spread = (rows - old.mean(0)).div(old.std(0)).std()
    assert 0.8 < float(spread) < 1.2


def test_noise_lies_around_the_mean_of_the_table(tiny: Any) -> None:
    """mean + std * noise, channel by channel: a start from no known word, as C-LoRA's paper has it
    (arXiv 2304.06027), within the table's own values."""
    weight = tiny.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(torch.linspace(0.5, 2, 128)).add_(torch.linspace(-3, 3, 128))
    mean, std = weight.detach().mean(0), weight.detach().std(0)
    tokens = [f"<v{n}>" for n in range(1, 65)]
    add(tiny, *tokens, init=None)
    rows = torch.stack(list(table(tiny).rows)).detach()
    noise = (rows - mean) / std
    assert float(noise.mean(0).abs().max()) < 5 / 8  # 5 deviations of a mean of 64
    assert float((noise.std(0) - 1).abs().max()) < 0.5
    assert abs(float(noise.mean())) < 0.05


def test_noise_is_the_same_every_time(tiny: Any, open_folder: Any, tiny_folder: Any) -> None:
    add(tiny, init=None)
    other = open_folder(tiny_folder)
    torch.manual_seed(99)
    add(other, init=None)
    assert torch.equal(table(tiny).rows[0], table(other).rows[0])


@pytest.mark.parametrize("token", ["fox", "FOX", "<|endoftext|>"], ids=["word", "case", "special"])
def test_an_existing_token_is_refused(token: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.new_token: token .* exists already"):
        add(tiny, token)


def test_another_than_the_one_there_is_proposed(tiny: Any) -> None:
    tiny.tokenizer.add_tokens(["<v1>"])  # as of an exported model that has learned it
    with pytest.raises(ValueError, match="choose another, like <v2>"):
        add(tiny, "<v1>")


@pytest.mark.parametrize("word", ["red fox", "qzxv", ""], ids=["two-words", "unknown", "empty"])
def test_a_start_word_must_be_one_token(word: str, tiny: Any) -> None:
    before = len(tiny.tokenizer)
    with pytest.raises(ValueError, match=rf"methods\.new_token: init '{word}' is \d+ tokens"):
        add(tiny, init=word)
    assert len(tiny.tokenizer) == before


def test_words_and_tokens_must_pair_up(tiny: Any) -> None:
    with pytest.raises(ValueError, match="init has 2 words for 1 tokens"):
        add(tiny, init=("fox", "cat"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        pytest.param(["a b"], "no single word", id="space"),
        pytest.param([" "], "no single word", id="blank"),
        pytest.param(["<v1>", "<v1>"], "named twice", id="twice"),
        pytest.param(["<v1>", "<V1>"], "named twice", id="twice-but-for-case"),
        pytest.param([], "methods.new_token.tokens", id="none"),
    ],
)
def test_wrong_tokens_are_refused_before_loading(tokens: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"new_token": {"tokens": tokens}})
    assert message in str(error.value)


def test_the_whole_table_is_seen_as_one(tiny: Any) -> None:
    add(tiny, "<v1>", "<v2>")
    embedding = table(tiny)
    ids = torch.arange(embedding.num_embeddings).view(-1, 1)
    assert torch.equal(embedding(ids).squeeze(1), embedding.weight)
    assert torch.equal(embedding.merged()(ids), embedding(ids))


def test_rows_have_a_gradient_where_no_prompt_names_them(tiny: Any) -> None:
    """Every rank of a distributed run must bring one."""
    add(tiny)
    tiny.encode_prompts(["a fox"]).tokens.sum().backward()
    assert table(tiny).rows[0].grad.abs().max() == 0
