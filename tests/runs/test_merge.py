"""Merging Custom Diffusion adapters: the closed form is the constrained optimum, on real
adapters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from trainer.config.header import read_header
from trainer.config.load import methods_of
from trainer.data.ordinary_captions import ordinary_captions
from trainer.data.world.scenes import draw_layout
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted, save_adapter
from trainer.runs.merge import closed_form, features, merge_concepts
from trainer.runs.merge_texts import CONCEPT_PROMPTS, ordinary_texts

CAPTIONS = [draw_layout(9, index).caption for index in range(200)]
SELECTIVE = {"sites": "cross", "projections": ["k", "v"]}


def made(
    folder: Path, path: Path, seed: int, open_folder: Any, token: str = "<v1>", **more: Any
) -> tuple[Path, Any]:
    """An adapter whose K, V and token moved, as by a training of its own, and its model."""
    model = open_folder(folder)
    tree = {"selective": SELECTIVE | more, "new_token": {"tokens": [token], "init": "fox"}}
    plan = apply_methods(model, methods_of(tree))
    generator = torch.Generator().manual_seed(seed)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            own[name].add_(0.05 * torch.randn(own[name].shape, generator=generator))
    tensors = {name: own[name] for name in plan.names}
    save_adapter(
        path, tensors, tree={"backbone": str(folder), "methods": tree}, identity=model.identity()
    )
    return path, model


def test_it_is_the_constrained_optimum() -> None:
    """Against the whole Lagrange system, solved at once, on odd sizes."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, ordinary, targets, values = draw(5, 7), draw(40, 7), draw(3, 7), draw(3, 5)
    found = closed_form(weight, ordinary, targets, values)
    gram = ordinary.T @ ordinary
    system = torch.zeros(10, 10, dtype=torch.float64)
    system[:7, :7], system[:7, 7:], system[7:, :7] = gram, targets.T, targets
    right = torch.cat([gram @ weight.T, values])
    torch.testing.assert_close(found.T, torch.linalg.solve(system, right)[:7])


def test_targets_that_are_already_met_change_nothing() -> None:
    weight, ordinary, targets = torch.randn(4, 6), torch.randn(30, 6), torch.randn(2, 6)
    weight, ordinary, targets = weight.double(), ordinary.double(), targets.double()
    found = closed_form(weight, ordinary, targets, targets @ weight.T)
    torch.testing.assert_close(found, weight)


def test_contradicting_targets_are_refused() -> None:
    targets = torch.randn(1, 6).double()
    targets = torch.cat([targets, 2 * targets])
    with pytest.raises(ValueError, match="cannot be told apart"):
        closed_form(
            torch.randn(4, 6).double(), torch.randn(30, 6).double(), targets, torch.randn(2, 4)
        )


@pytest.fixture(params=["unet", "dit"])
def either_folder(request: pytest.FixtureRequest, tiny_folder: Path, dit_folder: Path) -> Path:
    return tiny_folder if request.param == "unet" else dit_folder


def test_features_are_what_the_layers_read(either_folder: Path, open_folder: Any) -> None:
    model = open_folder(either_folder)
    read: dict[str, Any] = {}
    for site in model.sites:
        if site.kind == "cross":
            for role in ("k", "v"):
                site.projection(role).register_forward_hook(
                    lambda _, given, __, key=(site.name, role): read.update({key: given[0]})
                )
    prompts = ["a fox on a red background"]
    with torch.no_grad():
        x_t = torch.randn(1, 8, 16, 16)
        model.predict(x_t, torch.tensor([900]), model.encode_prompts(prompts))
    wanted = features(model, prompts, None)
    tokens = len(model.tokenizer(prompts[0]).input_ids)
    assert len(read) >= 4
    for found in read.values():
        assert torch.equal(found[0, 1:tokens].double(), wanted)


def test_layers_that_read_the_text_each_in_its_own_way_are_refused(tiny: Any) -> None:
    first, *_ = [site for site in tiny.sites if site.kind == "cross"]
    first.projection("k").register_forward_pre_hook(lambda _, given: (given[0] * 2,))
    with pytest.raises(ValueError, match="do not all read the same text features"):
        features(tiny, ["a fox"], None)


def affine(tensors: dict[str, Any], name: str) -> Any:
    """A layer's matrix in float64, with its bias as a last column where it has one."""
    bias = tensors.get(f"{name.removesuffix('weight')}bias")
    parts = [tensors[name]] if bias is None else [tensors[name], bias[:, None]]
    return torch.cat(parts, 1).detach().double()


def output(matrix: Any, features: Any) -> Any:
    ones = features.new_ones(len(features), matrix.shape[1] - features.shape[1])
    return torch.cat([features, ones], 1) @ matrix.T


def test_each_concept_keeps_its_values_and_captions_stay(
    either_folder: Path, tiny_folder: Path, tmp_path: Path, open_folder: Any
) -> None:
    (first, one), (second, two) = (
        made(either_folder, tmp_path / f"{seed}.safetensors", seed, open_folder) for seed in (1, 2)
    )
    out = tmp_path / "both.safetensors"
    assert merge_concepts([first, second], out, CAPTIONS) == ["<v1>", "<v2>"]
    both, tree = load_adapted(out)
    assert tree["methods"]["new_token"]["tokens"] == ["<v1>", "<v2>"]
    base = dict(open_folder(either_folder).named_parameters())
    merged = dict(both.named_parameters())
    names = [name for name in merged if "attn2.to_k.weight" in name or "attn2.to_v.weight" in name]
    assert names
    ordinary, unseen = (
        features(both, prompts, None)
        for prompts in (CAPTIONS, ["a cat left of a dog on a red background"])
    )
    targets: list[Any] = []
    values: dict[str, list[Any]] = {name: [] for name in names}
    for model, word in ((one, "<v1>"), (two, "<v2>")):
        for prompt in CONCEPT_PROMPTS:
            alone = features(model, [prompt.format("<v1>")], "<v1>")
            here = features(both, [prompt.format(word)], word)
            torch.testing.assert_close(here, alone, rtol=0, atol=1e-5)
            targets.append(here)
            own = dict(model.named_parameters())
            for name in names:
                wanted = output(affine(own, name), alone)
                found = output(affine(merged, name), here)
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
                values[name].append(wanted)
                if either_folder == tiny_folder:
                    moved = output(affine(merged, name) - affine(base, name), unseen).norm()
                    trained = output(affine(own, name) - affine(base, name), unseen).norm()
                    assert moved < 0.5 * trained
    for name in names:
        before = affine(base, name)
        width = before.shape[1]
        seen = output(torch.eye(width).double(), torch.cat(targets))
        # another matrix that gives the concepts the same, with the smallest change there is
        other = closed_form(before, torch.eye(width).double(), seen, torch.cat(values[name]))
        moved = [output(w - before, ordinary).norm() for w in (affine(merged, name), other)]
        assert moved[0] < moved[1]


def test_both_prompts_of_a_concept_and_every_caption_are_asked(
    tiny_folder: Path, tmp_path: Path, open_folder: Any
) -> None:
    """The whole Lagrange system of the paper (arXiv 2212.04488, equation 5) for a first layer: each
    concept's tokens from its word on, of the word alone and of a photo of it, and the tokens of all
    captions after the first."""
    parts = [made(tiny_folder, tmp_path / f"{n}.safetensors", n, open_folder) for n in (1, 2)]
    out = tmp_path / "both.safetensors"
    merge_concepts([path for path, _ in parts], out, CAPTIONS[:40])
    both, _ = load_adapted(out)
    (name, *_) = [n for n, _ in both.named_parameters() if "attn2.to_k.weight" in n]

    def tokens(prompts: list[str], first: str | None) -> Any:
        with torch.no_grad():
            read = both.encode_prompts(prompts).tokens.double()
        found = []
        for prompt, states in zip(prompts, read, strict=True):
            ids = both.tokenizer(prompt).input_ids
            begin = 1 if first is None else ids.index(both.tokenizer.convert_tokens_to_ids(first))
            found.append(states[begin : len(ids)])
        return torch.cat(found)

    targets, values = [], []
    for (_, model), word in zip(parts, ("<v1>", "<v2>"), strict=True):
        own = model.get_parameter(name).detach().double()
        targets.append(tokens([word, f"a photo of {word}"], word))
        values.append(targets[-1] @ own.T)
    ordinary = tokens(CAPTIONS[:40], None)
    before = open_folder(tiny_folder).get_parameter(name).detach().double()
    c, v, gram = torch.cat(targets), torch.cat(values), ordinary.T @ ordinary
    width = len(gram)
    system = torch.zeros(width + len(c), width + len(c), dtype=torch.float64)
    system[:width, :width], system[:width, width:], system[width:, :width] = gram, c.T, c
    right = torch.cat([gram @ before.T, v])
    wanted = torch.linalg.lstsq(system, right, driver="gelsd").solution[:width].T
    found = both.get_parameter(name).detach().double()
    for asked in (c, ordinary):
        torch.testing.assert_close(asked @ found.T, asked @ wanted.T, rtol=1e-3, atol=1e-3)
    moved = (ordinary @ (wanted - before).T).norm()
    assert float((ordinary @ (found - wanted).T).norm()) < 1e-3 * float(moved)


def test_a_class_word_follows_its_token(
    tiny_folder: Path, tmp_path: Path, open_folder: Any
) -> None:
    """As in the official code: `<v1> animal` and `a photo of <v1> animal`, from the token on. The
    merged K gives these what each concept's own gave, under the names the tokens have now."""
    paths, models = [], []
    for seed, kind in ((1, "cat"), (2, "dog")):
        path, model = made(tiny_folder, tmp_path / f"{seed}.safetensors", seed, open_folder)
        tree, identity = read_header(path)
        data = {"source": "concept", "concept": f"./{kind}", "class_word": kind}
        save_adapter(path, load_file(path), tree=tree | {"data": data}, identity=identity)
        paths.append(path)
        models.append(model)
    out = tmp_path / "both.safetensors"
    merge_concepts(paths, out, CAPTIONS)
    both, _ = load_adapted(out)
    (name, *_) = [n for n, _ in both.named_parameters() if "attn2.to_k.weight" in n]
    merged = both.get_parameter(name).detach().double()
    for model, word, kind in zip(models, ("<v1>", "<v2>"), ("cat", "dog"), strict=True):
        own = model.get_parameter(name).detach().double()
        for prompt in ("{}", "a photo of {}"):
            here = features(both, [prompt.format(f"{word} {kind}")], word)
            assert len(here) == 3  # the token, its class word, the end of text
            torch.testing.assert_close(here @ merged.T, here @ own.T, rtol=1e-4, atol=1e-4)


def whole_words(words: set[str]) -> Any:
    """A tokenizer whose vocabulary has every one of the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["?", *sorted(words)])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


def test_ordinary_captions_fit_the_backbone(tiny: Any) -> None:
    """Photographs for one whose tokenizer knows their words, and the world's for one that would
    read them letter by letter."""
    own = ordinary_texts(tiny.tokenizer)
    assert len(set(own)) > 190
    assert {word.strip(",") for text in own for word in text.split()} <= {
        token.removesuffix("</w>") for token in tiny.tokenizer.get_vocab()
    }
    photographs = ordinary_captions(200)
    words = {word for text in photographs for word in text.split()}
    assert ordinary_texts(whole_words(words)) == photographs
    assert len(set(photographs)) == 200
    assert len(words) > 200


def test_the_merged_recipe_names_every_concept(
    tiny_folder: Path, tmp_path: Path, open_folder: Any
) -> None:
    """Class words are kept only if every concept has one: the data section needs all or none."""
    trees = {}
    for name, data in {
        "fox": {"concept": "sprite:fox", "token": "<v1>", "class_word": "animal"},
        "car": {"concept": "./car", "token": "<v1>", "class_word": "car"},
        "bare": {"concept": "./bare", "token": "<v1>"},
    }.items():
        path, _ = made(tiny_folder, tmp_path / f"{name}.safetensors", 1, open_folder)
        tree, identity = read_header(path)
        tensors = load_file(path)
        tensors = {key: value + 0.01 * len(trees) for key, value in tensors.items()}
        save_adapter(path, tensors, tree=tree | {"data": data}, identity=identity)
        trees[name] = path
    merged = {}
    for pair in (("fox", "car"), ("fox", "bare")):
        out = tmp_path / f"{'-'.join(pair)}.safetensors"
        merge_concepts([trees[name] for name in pair], out, CAPTIONS[:20])
        merged[pair[1]] = read_header(out)[0]["data"]
    assert merged["car"]["concept"] == ["sprite:fox", "./car"]
    assert merged["car"]["token"] == ["<v1>", "<v2>"]
    assert merged["car"]["class_word"] == ["animal", "car"]
    assert merged["bare"]["class_word"] is None


def test_what_cannot_be_merged_is_refused(
    tiny_folder: Path, other_folder: Path, tmp_path: Path, open_folder: Any
) -> None:
    first, _ = made(tiny_folder, tmp_path / "a.safetensors", 1, open_folder)
    queries, _ = made(tiny_folder, tmp_path / "q.safetensors", 1, open_folder, projections=["q"])
    foreign, _ = made(other_folder, tmp_path / "f.safetensors", 1, open_folder)
    out = tmp_path / "out.safetensors"
    for paths, message in (
        ([first], "give at least two"),
        ([first, queries], "differs from that of the first"),
        ([queries, queries], "for k and v, which read the text"),
        ([first, foreign], "was trained on backbone"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_concepts(paths, out)
    tree, identity = read_header(first)
    long = tmp_path / "long.safetensors"
    tree = tree | {"text": {"max_tokens": 60}}
    save_adapter(long, load_file(first), tree=tree, identity=identity)
    with pytest.raises(
        ValueError, match=r"long\.safetensors reads 60 tokens of a prompt, .* None;"
    ):
        merge_concepts([first, long], out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(ValueError, match="nothing is overwritten"):
        merge_concepts([first, first], out)
    assert out.read_text() == "mine"


def test_the_verb_says_which_words_there_are(
    tiny_folder: Path, tmp_path: Path, open_folder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.__main__ import main

    one, _ = made(tiny_folder, tmp_path / "1.safetensors", 1, open_folder)
    two, _ = made(tiny_folder, tmp_path / "2.safetensors", 2, open_folder)
    captions = tmp_path / "captions.txt"
    captions.write_text("a cat on a mat\n\na dog left of a fox\n")
    out = tmp_path / "both.safetensors"
    assert main(["merge", f"adapter=[{one},{two}]", f"out={out}", f"captions={captions}"]) == 0
    assert capsys.readouterr().out.strip().endswith("both.safetensors: <v1>, <v2>")
    assert load_adapted(out)[1]["methods"]["new_token"]["tokens"] == ["<v1>", "<v2>"]
    captions.write_text("\n")
    again = ["merge", f"adapter=[{one},{two}]", f"out={tmp_path / 'x'}", f"captions={captions}"]
    assert main(again) == 78
    assert main(["merge", f"adapter={one}", f"out={tmp_path / 'x'}"]) == 78


def _two_backbones(
    folder: Path, other: Path, save_trained_on: Callable[..., Path]
) -> tuple[Path, Path]:
    return tuple(  # type: ignore[return-value]
        save_trained_on(
            place,
            {
                "selective": {"sites": "cross", "projections": ["k", "v"]},
                "new_token": {"tokens": [token], "init": "fox"},
            },
            name=name,
        )
        for place, token, name in ((folder, "<v1>", "one"), (other, "<v2>", "other"))
    )


def test_each_of_two_backbones_is_named_with_its_own_adapter(
    tiny_folder: Path, other_folder: Path, tmp_path: Path, save_trained_on: Callable[..., Path]
) -> None:
    one, other = _two_backbones(tiny_folder, other_folder, save_trained_on)
    with pytest.raises(
        ValueError,
        match=rf"adapter={other} was trained on backbone {other_folder} .*; "
        rf"adapter={one} on {tiny_folder} .*; give adapters of one backbone$",
    ):
        merge_concepts([one, other], tmp_path / "out")


def test_two_backbones_of_equal_shapes_are_told_apart(
    tiny_folder: Path, tmp_path: Path, save_trained_on: Callable[..., Path]
) -> None:
    from safetensors.torch import load_file, save_file

    twin = tmp_path / "twin"
    shutil.copytree(tiny_folder, twin)
    file = twin / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {key: value * 1.5 for key, value in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    one, other = _two_backbones(tiny_folder, twin, save_trained_on)
    with pytest.raises(
        ValueError,
        match=rf"adapter={other} was trained on backbone {twin} and adapter={one} on {tiny_folder}",
    ):
        merge_concepts([one, other], tmp_path / "out")
