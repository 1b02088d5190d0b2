"""Several adapters at once: every weight is W0 plus the sum of what each one adds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.config.prompts import words_in
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.runs.adapter import load_adapted
from trainer.runs.sum_adapters import load_summed

Save = Callable[..., Path]
LORA = {"lora": {"sites": "all", "rank": 2, "alpha": 3}}
ONE = {"selective": {}, "new_token": {"tokens": ["<v1>"]}}
OTHER = {"lora": {"sites": "cross", "rank": 3}, "new_token": {"tokens": ["<v2>", "<v3>"]}}
KNOWN = {"word_embedding": {"tokens": ["fox"]}, "full": {}}


def effective(model: Any) -> dict[str, torch.Tensor]:
    """The weights of linear layers, convolutions and norms, by plain name, in float64."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        if "lora_" not in name and ".rows." not in name:
            found[name.replace(".base_layer", "").replace(".table", "")] = value.detach().double()
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            for adapter in layer.active_adapters:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                delta = layer.scaling[adapter] * (b.double().flatten(1) @ a.double().flatten(1))
                key = f"{name}.weight"
                found[key] = found[key] + delta.view_as(found[key])
    return found


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("first", "second"),
    [(LORA, LORA), (ONE, OTHER), (LORA, KNOWN), (KNOWN, OTHER), (ONE, LORA)],
    ids=["lora+lora", "custom+lora", "lora+full", "full+lora", "custom+lora without words"],
)
def test_dw_is_the_weighted_sum(
    first: dict[str, Any], second: dict[str, Any], tiny: Any, tiny_folder: Path,
    save_trained_on: Save,
) -> None:  # fmt: skip
    paths = [save_trained_on(tiny_folder, first, "a"), save_trained_on(tiny_folder, second, "b")]
    scales = (0.8, -0.5)
    summed, _ = load_summed(paths, scales)
    base = effective(tiny)
    parts = [effective(load_adapted(path)[0]) for path in paths]
    own, moved = effective(summed), 0
    for name, value in base.items():
        if "token_embedding" in name:
            continue  # known words are the next test's
        changes = [scale * (part[name] - value) for scale, part in zip(scales, parts, strict=True)]
        torch.testing.assert_close(own[name], value + sum(changes), rtol=0, atol=1e-6)
        moved += sum(bool(change.any()) for change in changes)
        if not any(change.any() for change in changes):
            assert torch.equal(own[name], value)
    assert moved > 4


def test_a_known_word_adds_up(tiny: Any, tiny_folder: Path, save_trained_on: Save) -> None:
    methods = [{"word_embedding": {"tokens": words}} for words in (["fox"], ["fox", "red"])]
    paths = [
        save_trained_on(tiny_folder, own, name) for own, name in zip(methods, "ab", strict=True)
    ]
    tables = [load_adapted(path)[0].text_encoder.get_input_embeddings().weight for path in paths]
    base = tiny.text_encoder.get_input_embeddings().weight
    summed, _ = load_summed(paths, (0.5, 2.0))
    own = summed.text_encoder.get_input_embeddings().weight
    wanted = base + 0.5 * (tables[0] - base) + 2.0 * (tables[1] - base)
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-6)
    assert int((own != base).any(1).sum()) == 2


def test_alone_or_with_one_at_0_it_is_the_adapter(tiny_folder: Path, save_trained_on: Save) -> None:
    paths = [save_trained_on(tiny_folder, ONE, "a"), save_trained_on(tiny_folder, OTHER, "b")]
    how = Sampling(steps=2, guidance=3.0)
    summed, _ = load_summed(paths, (1.0, 0.0))
    alone, _ = load_adapted(paths[0])
    for prompt in ("a <v1> on a tree", "a fox"):
        own, wanted = (sample(model, [prompt], [1], settings=how) for model in (summed, alone))
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-4)
    assert not any(value.requires_grad for value in summed.parameters())
    assert not summed.training


def test_all_words_are_there_and_mean_what_they_did(
    tiny_folder: Path, save_trained_on: Save
) -> None:
    paths = [save_trained_on(tiny_folder, ONE, "a"), save_trained_on(tiny_folder, OTHER, "b")]
    summed, tree = load_summed(paths, (1.0, 1.0))
    assert words_in(tree, summed.tokenizer.get_vocab()).added == ["<v1>", "<v2>", "<v3>"]
    for path, words in zip(paths, (["<v1>"], ["<v2>", "<v3>"]), strict=True):
        alone = load_adapted(path)[0]
        for word in words:
            one, other = (
                model.text_encoder.get_input_embeddings().weight[
                    model.tokenizer.convert_tokens_to_ids(word)
                ]
                for model in (alone, summed)
            )
            assert torch.equal(one, other)


def test_one_word_learned_twice_is_refused(tiny_folder: Path, save_trained_on: Save) -> None:
    paths = [save_trained_on(tiny_folder, ONE, name) for name in "ab"]
    with pytest.raises(ValueError, match="have both learned the word <v1>") as error:
        load_summed(paths, (1.0, 1.0))
    assert str(paths[0]) in str(error.value) and str(paths[1]) in str(error.value)
    assert "join them with `merge`" in str(error.value)
    lora = save_trained_on(tiny_folder, LORA | {"new_token": {"tokens": ["<v1>"]}}, "c")
    with pytest.raises(ValueError, match=r"with another data\.token$"):  # which merge does not take
        load_summed([paths[0], lora], (1.0, 1.0))


def test_what_cannot_be_added_is_refused_by_name(tiny_folder: Path, save_trained_on: Save) -> None:
    paths = [
        save_trained_on(tiny_folder, LORA, "a"),
        save_trained_on(tiny_folder, {"dora": {"sites": "cross"}}, "b"),
    ]
    with pytest.raises(ValueError, match=r"adapter: adapter=.*b.safetensors has methods\.dora"):
        load_summed(paths, (1.0, 1.0))


def test_other_backbones_are_refused(
    tiny_folder: Path, other_folder: Path, tmp_path: Path, save_trained_on: Save
) -> None:
    """Of other shapes, and of equal shapes and other weights; unless one is given for both."""
    changed = tmp_path / "changed"
    shutil.copytree(tiny_folder, changed)
    file = changed / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"] += 1
    save_file(weights, file, {"format": "pt"})
    first = save_trained_on(tiny_folder, LORA, "a")
    for folder in (other_folder, changed):
        second = save_trained_on(folder, LORA, "b")
        with pytest.raises(ValueError, match="which differ in unet; only adapters of one") as error:
            load_summed([first, second], (1.0, 1.0))
        assert str(folder) in str(error.value) and str(tiny_folder) in str(error.value)
    load_summed([first, second], (1.0, 1.0), str(changed))


def test_other_objectives_are_refused(tiny_folder: Path, save_trained_on: Save) -> None:
    first = save_trained_on(tiny_folder, LORA, "a")
    second = save_trained_on(tiny_folder, LORA, "b", objective={"target": "eps"})
    with pytest.raises(
        ValueError, match=r"predicts eps, and adapter=.* v; only adapters of one obj"
    ):
        load_summed([first, second], (1.0, 1.0))
