"""Import of other tools' files: what is read, what is reported, what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sdxl_folder import make_sdxl_folder
from torch import Tensor

from trainer.__main__ import main
from trainer.backbones.word_vectors import with_all_vectors
from trainer.common.exit_codes import BAD_RECIPE
from trainer.config.header import read_header
from trainer.config.load import methods_of
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, FullDelta, LowRankDelta
from trainer.export.bundle_methods import recipe_of
from trainer.export.detect import detect
from trainer.export.factor import exact, fitted, truncated
from trainer.export.import_ import import_file, read_bundle
from trainer.export.layer_names import ldm
from trainer.export.read_layers import read_layers
from trainer.export.read_names import Names
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import start_from

MIDDLE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
SAME_LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
Edit = Callable[[dict[str, Tensor]], object]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def kohya_file(written: Any) -> Path:
    return Path(written("lora", "kohya")[0] / "my_dog.safetensors")


@pytest.fixture
def changed(kohya_file: Path, tmp_path: Path) -> Callable[[Edit], Path]:
    """The file after an edit of its tensors."""

    def change(edit: Edit) -> Path:
        tensors = load_file(kohya_file)
        edit(tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path)
        return path

    return change


def test_a_run_starts_from_it(
    kohya_file: Path, tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    path = import_file(kohya_file, str(tiny_folder), tmp_path / "back.safetensors", say=quiet)
    tree, _ = read_header(path)
    assert tree["methods"]["lora"]["rank"] == 4
    plan = apply_methods(tiny, methods_of(tree["methods"]))
    start_from(path, tiny, plan)
    own = dict(tiny.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in load_file(path).items())
    assert set(plan.stored) == set(load_file(path))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "form", "wanted"),
    [
        ("lora", "kohya", "kohya"),
        ("custom", "comfyui", "diff"),
        ("lora", "diffusers", "diffusers"),
        ("custom", "custom_diffusion", "custom_diffusion"),
        ("words", "diffusers", "diffusers"),
    ],
)
def test_the_format_is_recognised(name: str, form: str, wanted: str, written: Any) -> None:
    assert detect(written(name, form)[0]) == wanted


def test_what_a_mac_leaves_in_a_folder_is_no_file_of_weights(
    kohya_file: Path, tiny: Any, tmp_path: Path
) -> None:
    shutil.copy(kohya_file, tmp_path / "lora.safetensors")
    (tmp_path / "embeddings").mkdir()
    for left in ("._lora.safetensors", "embeddings/._v1.safetensors"):
        (tmp_path / left).write_bytes(b"\0\5\x16\7")
    assert detect(tmp_path) == "kohya"
    assert read_bundle("kohya", tmp_path, tiny).layers


def test_an_embedding_alone(written: Any, tiny_folder: Path, tmp_path: Path) -> None:
    out, _ = written("words", "diffusers")
    file = out / "embeddings" / "v1.safetensors"
    assert detect(file) == "embedding"
    back = import_file(file, str(tiny_folder), tmp_path / "back.safetensors", say=quiet)
    assert read_header(back)[0]["methods"] == {"new_token": {"tokens": ["<v1>"]}}
    (row,), (other,) = load_file(back).values(), load_file(file).values()
    assert torch.equal(row, other)


def test_all_vectors_of_a_word_are_one_file(
    written: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """Which UIs read for one word; the proof of the export reads it with diffusers."""
    out, _ = written("vectors", "diffusers")
    shapes = {
        path.name: [(key, tuple(value.shape)) for key, value in load_file(path).items()]
        for path in (out / "embeddings").iterdir()
    }
    assert shapes == {
        "v1.safetensors": [("<v1>", (2, 128))], "v2.safetensors": [("<v2>", (128,))]
    }  # fmt: skip
    back = import_file(out, str(tiny_folder), tmp_path / "back", say=quiet)
    assert read_header(back)[0]["methods"]["new_token"]["tokens"] == ["<v1>", "<v1>_1", "<v2>"]


def test_words_beside_a_file_that_do_not_fit_are_left_out_and_said(
    kohya_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(kohya_file, tmp_path / "lora.safetensors")
    (tmp_path / "embeddings").mkdir()
    save_file({"<v1>": torch.ones(128)}, tmp_path / "embeddings" / "mine.safetensors")
    save_file({"other": torch.ones(64)}, tmp_path / "embeddings" / "other.safetensors")
    said: list[str] = []
    out = tmp_path / "back"
    import_file(tmp_path / "lora.safetensors", str(tiny_folder), out, say=said.append)
    assert said[0] == "<v1> of embeddings/mine.safetensors beside it is read too"
    assert said[1].startswith("embeddings/other.safetensors beside it is left out: ")
    assert "64 wide" in said[1]
    assert read_header(out)[0]["methods"]["new_token"]["tokens"] == ["<v1>"]


def test_several_rows_under_one_word(tiny_folder: Path, tmp_path: Path) -> None:
    save_file({"emb_params": torch.randn(2, 128)}, tmp_path / "cat.safetensors")
    back = import_file(
        tmp_path / "cat.safetensors", str(tiny_folder), tmp_path / "back.safetensors", say=quiet
    )
    words = read_header(back)[0]["methods"]["new_token"]["tokens"]
    assert words == ["<cat>", "<cat>_1"]


@pytest.mark.parametrize(
    ("key", "width", "has", "lacks"),
    [("clip_l", 32, "text_encoder", "text_encoder_2"), ("clip_g", 48, "text_encoder_2", "text_en"),
     ("emb_params", 32, "text_encoder", "text_encoder_2")],
)  # fmt: skip
def test_a_word_of_one_text_encoder_of_two_is_refused(
    key: str, width: int, has: str, lacks: str, tmp_path: Path
) -> None:
    """The other one would get noise for it."""
    base, file = make_sdxl_folder(tmp_path / "base"), tmp_path / "cat.safetensors"
    save_file({key: torch.ones(2, width)}, file)
    says = rf"holds the word <cat> for {has} alone, and this backbone's {lacks}.* reads it too"
    with pytest.raises(ValueError, match=says):
        import_file(file, str(base), tmp_path / "back", say=quiet)
    assert not (tmp_path / "back").exists()


def test_a_missing_alpha_is_the_rank_and_is_reported(
    changed: Callable[[Edit], Path], tiny_folder: Path, tmp_path: Path
) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("alpha")]:
            del tensors[key]

    said: list[str] = []
    import_file(changed(drop), str(tiny_folder), tmp_path / "back", say=said.append)
    assert said[0] == "77 layers have no alpha: their rank is used, which is a factor of 1"


def pop(key: str) -> Edit:
    return lambda tensors: tensors.pop(key)


def put(key: str, value: Tensor) -> Edit:
    return lambda tensors: tensors.update({key: value})


def rename(old: str, new: str) -> Edit:
    def edit(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(
            pop(f"{MIDDLE}.lora_up.weight"),
            rf"the down matrix of {MIDDLE} without its up matrix; 1 of 77 layers are incomplete",
            id="half",
        ),
        pytest.param(
            put(f"{MIDDLE}.lora_up.weight", torch.full((32, 4), torch.nan)),
            rf"{MIDDLE}\.lora_up\.weight holds values that are not finite, 1 such",
            id="nan",
        ),
        pytest.param(
            put(f"{MIDDLE}.lora_up.weight", torch.full((32, 4), torch.inf)),
            rf"{MIDDLE}\.lora_up\.weight holds values that are not finite, 1 such",
            id="inf",
        ),
        pytest.param(
            lambda tensors: tensors.update(
                {
                    f"{SAME_LAYER}.lora_A.weight": torch.ones(4, 128),
                    f"{SAME_LAYER}.lora_B.weight": torch.ones(32, 4),
                }
            ),
            rf"adapts {SAME_LAYER} twice, as (lora_)?unet\S+ and as (lora_)?unet",
            id="twice",
        ),
        pytest.param(
            put(f"{MIDDLE}.lora_down.weight", torch.ones(4, 64)),
            r"attn2\.to_k of shape \(32, 64\); in backbone \S+ it is \(32, 128\)",
            id="shape",
        ),
        pytest.param(
            put(f"{MIDDLE}.lora_down.weight", torch.ones(3, 128)),
            r"two matrices of lora_unet_mid_block\S+ do not fit: down \(3, 128\), up \(32, 4\)",
            id="ranks",
        ),
        pytest.param(
            rename("lora_unet_mid_block", "lora_unet_down_blocks_7"),
            r"the file adapts lora_unet_down_blocks_7\S+, \d+ such layers of 77, .* give that as",
            id="layers",
        ),
        pytest.param(
            put(f"{MIDDLE}.dora_scale", torch.ones(1, 128)),
            r"dora_scale of lora_unet\S+ as \(1, 128\): DoRA over inputs",
            id="dora-scale",
        ),
        pytest.param(
            put(f"{MIDDLE}.dora_scale", torch.ones(32)),
            r"dora_scale of lora_unet\S+ as \(32,\), which does not say whether it has norms of",
            id="dora-scale-flat",
        ),
        pytest.param(
            put(f"{MIDDLE}.hada_w1_a", torch.ones(4, 4)),
            "the hada_w1_a of lora_unet_mid_block.* without its hada_w1_b",
            id="loha",
        ),
        pytest.param(
            put("step", torch.ones(1)), "holds step, which belongs to no kind", id="stray"
        ),
    ],
)
def test_the_message_says_what_is_wrong_with_a_file(
    edit: Edit, message: str, changed: Callable[[Edit], Path], tiny_folder: Path, tmp_path: Path
) -> None:
    path = changed(edit)
    with pytest.raises(ValueError, match=message) as caught:
        import_file(path, str(tiny_folder), tmp_path / "back", say=quiet)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_a_bias_is_refused_by_what_is_wrong_with_it(tiny: Any) -> None:
    norm = "unet.down_blocks.0.attentions.0.norm"
    width = len(tiny.get_submodule(norm).bias)
    says = rf"the bias of {norm} by \(3,\) values, and in backbone \S+ it has \({width},\)"
    with pytest.raises(ValueError, match=says):
        read_layers({f"{norm}.diff_b": torch.ones(3)}, tiny)
    query = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    with pytest.raises(ValueError, match=rf"changes a bias of {query} that \S+ has not"):
        read_layers({f"{query}.diff_b": torch.ones(64)}, tiny)


def test_every_layer_of_a_text_encoder_has_an_option(tiny: Any) -> None:
    paths = [f"text_encoder.encoder.layers.0.{name}" for name in ("mlp.fc1", "self_attn.q_proj")]
    pairs = {}
    for path in paths:
        layer = tiny.get_submodule(path)
        pairs[path] = LowRankDelta(
            torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
        )
    found = recipe_of(Bundle(pairs, {}), tiny)
    assert found == {"lora": {"rank": 2, "sites": None, "text_encoder": ["q", "fc1"]}}


def test_another_backbone_is_refused_by_shape(
    kohya_file: Path, other_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"of shape \(32, .*\); in backbone \S+other it is \(48, "):
        import_file(kohya_file, str(other_folder), tmp_path / "back", say=quiet)


class Canary:
    """Unpickling one makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_a_pickle_is_never_opened_and_its_conversion_named(
    suffix: str, in_folder: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    path = folder / f"lora{suffix}"
    torch.save({"weight": Canary(tmp_path / "sprung")}, path)
    with pytest.raises(ValueError, match=r"a pickle.*weights_only=True.*'lora\.safetensors'"):
        import_file(folder if in_folder else path, "tiny", tmp_path / "back", say=quiet)
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("held", "key", "form"),
    [
        (
            {"a.to_k_custom_diffusion.weight": torch.ones(2, 2).T, "b": {}},
            "a.to_k_custom_diffusion.weight",
            "custom_diffusion",
        ),
        ({"state_dict": {"u.lora_A.weight": torch.ones(2)}}, "u.lora_A.weight", "diffusers"),
        (
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 8)}, "step": 9},
            "*",
            "embedding",
        ),
        ({"<cat>": torch.ones(8)}, "<cat>", "embedding"),
    ],
    ids=["top", "state_dict", "A1111", "diffusers"],
)
def test_the_named_conversion_works(
    held: dict[str, Any], key: str, form: str, tmp_path: Path
) -> None:
    import shlex
    import subprocess

    torch.save(held, tmp_path / "x.bin")
    with pytest.raises(ValueError) as caught:
        detect(tmp_path / "x.bin")
    command = shlex.split(str(caught.value).partition("convert it once: ")[2])
    subprocess.run(command, cwd=tmp_path, check=True)
    assert list(load_file(tmp_path / "x.safetensors")) == [key]
    assert detect(tmp_path / "x.safetensors") == form


def test_paths_that_cannot_be_imported(trained: Any, tiny_folder: Path, tmp_path: Path) -> None:
    where = {"backbone": "tiny", "out": tmp_path / "back"}
    with pytest.raises(ValueError, match="no such file or folder"):
        import_file(tmp_path / "nowhere", **where)
    with pytest.raises(
        ValueError, match="is a complete pipeline; train on it as it is, with backbone="
    ):
        import_file(tiny_folder, **where)
    with pytest.raises(ValueError, match=r"is already an adapter .*; use it as run\.start_from="):
        import_file(trained("lora"), **where)
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match=r"out=\S+mine exists; .* nothing is overwritten"):
        import_file(trained("lora"), "tiny", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "keep"
    save_file({"conv.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"its keys, like conv\.weight, are of no known format"):
        import_file(tmp_path / "model.safetensors", **where)


def test_the_verb(
    kohya_file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"file={kohya_file}", f"backbone={tiny_folder}", f"out={tmp_path / 'back'}"]
    assert main(["import", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("diffusers' load_lora_weights makes the same weights of 77 layers")
    assert lines[1].startswith("kohya: 77 LoRA layers; the adapter's output differs from that")
    recipe = tmp_path / "back.yaml"
    assert lines[2].startswith(f"to start from it: python -m trainer fit recipe={recipe} ")
    assert lines[3] == str(tmp_path / "back")
    assert main(["import", *words]) == BAD_RECIPE
    assert "exists; give a file that does not" in capsys.readouterr().err
    assert main(["import", words[0]]) == BAD_RECIPE
    assert "error: backbone is missing, as in backbone=sd15" in capsys.readouterr().err


def test_a_selector_replaces_the_names_of_layers_where_possible(tiny: Any) -> None:
    def pair(path: str) -> LowRankDelta:
        layer = tiny.get_submodule(path)
        return LowRankDelta(torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2))

    sites = [f"unet.{site.name}" for site in tiny.sites if site.kind == "self"]
    both = {f"{site}.to_{role}": pair(f"{site}.to_{role}") for site in sites for role in "qv"}
    feed = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    found = recipe_of(Bundle(both | {feed: pair(feed)}, {}), tiny)["lora"]
    assert found == {
        "rank": 2, "sites": "self", "projections": ["q", "v"], "layers": [feed[len("unet.") :]]
    }  # fmt: skip
    one = next(iter(both))
    found = recipe_of(Bundle({one: both[one]}, {}), tiny)["lora"]
    assert found == {"rank": 2, "sites": None, "layers": [one[len("unet.") :]]}


def test_the_rank_is_that_of_most_layers(tiny: Any) -> None:
    sites = [f"unet.{site.name}.to_k" for site in tiny.sites if site.kind == "self"]
    layers = {}
    for path in sites:
        layer, rank = tiny.get_submodule(path), 8 if path == sites[0] else 2
        layers[path] = LowRankDelta(
            torch.ones(rank, layer.in_features), torch.ones(len(layer.weight), rank)
        )
    found = recipe_of(Bundle(layers, {}), tiny)["lora"]
    assert (found["rank"], found["ranks"]) == (2, {sites[0]: 8})


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 3, 5), (4, 3, 3, 3), (30, 2, 3, 3)], ids=str)
def test_a_full_matrix_is_a_pair_of_full_rank(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    pair = exact(weight)
    assert pair.rank == min(shape[0], weight[0].numel())
    assert pair.down.shape == (pair.rank, *shape[1:])
    assert pair.up.shape == (shape[0], pair.rank, *[1] * (len(shape) - 2))
    assert torch.equal((pair.up.flatten(1) @ pair.down.flatten(1)).view(shape), weight)


def test_a_rank_above_the_layers_sides_is_lowered_without_loss() -> None:
    pair = LowRankDelta(torch.randn(20, 5), torch.randn(9, 20), 0.5)
    small = fitted(pair)
    assert small.rank == 5
    torch.testing.assert_close(small.up @ small.down, 0.5 * pair.up @ pair.down)
    assert fitted(small) is small


def test_truncation_keeps_the_leading_directions() -> None:
    u, _ = torch.linalg.qr(torch.randn(6, 3))
    v, _ = torch.linalg.qr(torch.randn(7, 3))
    weight = u @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ v.T
    bundle, kept = truncated(Bundle({"a": LowRankDelta(v.T, u * torch.tensor([3.0, 2, 1]))}, {}), 2)
    assert kept == pytest.approx(13 / 14)
    pair = bundle.layers["a"]
    assert isinstance(pair, LowRankDelta)
    left = weight - pair.up @ pair.down
    torch.testing.assert_close(left, u[:, 2:] @ v[:, 2:].T, rtol=0, atol=1e-5)


def test_truncation_reports_the_least_energy_and_leaves_biases() -> None:
    steep = FullDelta(torch.diag(torch.tensor([3.0, 1.0])))
    flat = FullDelta(torch.eye(2))
    biased = FullDelta(torch.eye(2), torch.ones(2))
    bundle, kept = truncated(Bundle({"a": flat, "b": steep, "c": biased}, {}), 1)
    assert kept == pytest.approx(1 / 2)
    assert bundle.layers["c"] is biased
    assert [getattr(bundle.layers[name], "rank", None) for name in "ab"] == [1, 1]


def test_a_recipe_beside_it_trains_on(
    kohya_file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.config.load import load_recipe

    out = tmp_path / "mine.safetensors"
    import_file(kohya_file, str(tiny_folder), out, say=quiet)
    recipe = load_recipe([f"recipe={tmp_path / 'mine.yaml'}", "data.class_word=dog"])
    assert recipe.run.start_from == out
    assert recipe.backbone_name == str(tiny_folder)
    assert list(recipe.methods) == ["lora"]
    assert recipe.tree["methods"]["lora"] == read_header(out)[0]["methods"]["lora"]
    out.unlink()
    with pytest.raises(ValueError, match=r"mine\.yaml exists"):
        import_file(kohya_file, str(tiny_folder), out, say=quiet)


def test_one_word_of_a_prompt_is_all_its_vectors(tiny: Any, tiny_folder: Path) -> None:
    rows = {f"<cat>{end}": {"text_encoder": torch.randn(128)} for end in ("", "_1", "_2")}
    add_to(tiny, Bundle({}, rows))
    tokenizer = tiny.tokenizer
    own = tokenizer.convert_tokens_to_ids([*rows])
    for prompt in ("a <cat> here", "a <cat> <cat>_1 <cat>_2 here"):
        ids = tiny.tokens([prompt]).input_ids[0].tolist()
        start = ids.index(own[0])
        assert ids[start : start + 3] == own
        assert [ids.count(number) for number in own] == [1, 1, 1]
    # as diffusers' pipeline does
    wanted = tiny.pipeline().maybe_convert_prompt("a <cat> here", tokenizer)
    assert with_all_vectors("a <cat> here", tokenizer.get_added_vocab()) == wanted


def test_a_convolution_in_groups_is_refused_and_not_given_a_rank(sana: Any) -> None:
    model = sana()
    for rank in (4, 32, 80):
        chosen = methods_of({"lora": {"sites": None, "layers": ["*conv_depth"], "rank": rank}})[
            "lora"
        ]
        with pytest.raises(ValueError, match=r"conv_depth is a convolution in groups, on which no"):
            chosen.apply(model)
    layers = ["*conv_inverted", "*conv_point"]
    methods_of({"lora": {"sites": None, "layers": layers}})["lora"].apply(model)


@pytest.mark.parametrize(
    "name",
    [
        "unet.{}", "unet.base_model.model.{}", "base_model.model.unet.{}", "diffusion_model.{}",
        "model.diffusion_model.{}", "lora_unet.{}", "{}", "base_model.model.{}", "lora_unet_{flat}",
        "lycoris_{flat}", "lora_unet_{flat_old}", "lycoris_{flat_old}", "diffusion_model.{old}",
        "model.diffusion_model.{old}", "{old}", "unet.{old}", "lora_unet.{old}",
    ],
)  # fmt: skip
def test_names_of_a_unets_layer(name: str, tiny: Any) -> None:
    own = "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    old = ldm(tiny.unet)[own]
    flat, flat_old = own.replace(".", "_"), old.replace(".", "_")
    found = Names(tiny).find(name.format(own, old=old, flat=flat, flat_old=flat_old))
    assert found == (f"unet.{own}",)


@pytest.mark.parametrize(
    "name",
    [
        "text_encoder.{}", "text_encoder.text_model.{}", "text_encoders.clip_l.text_model.{}",
        "text_encoders.clip_l.transformer.text_model.{}", "clip_l.transformer.text_model.{}",
        "clip_l.{}", "cond_stage_model.transformer.text_model.{}", "te1.text_model.{}",
        "conditioner.embedders.0.transformer.text_model.{}", "lora_te.text_model.{}",
        "text_encoder.base_model.model.text_model.{}", "base_model.model.text_model.{}",
        "text_model.{}", "lora_te_text_model_{flat}", "lora_te1_text_model_{flat}",
        "lora_te_{flat}", "lycoris_text_model_{flat}", "lycoris_{flat}",
    ],
)  # fmt: skip
def test_names_of_a_text_encoders_layer(name: str, tiny: Any) -> None:
    own = "encoder.layers.1.mlp.fc1"
    found = Names(tiny).find(name.format(own, flat=own.replace(".", "_")))
    assert found == (f"text_encoder.{own}",)


@pytest.mark.parametrize(
    "start",
    [
        "cond_stage_model.model.transformer.", "conditioner.embedders.0.model.transformer.",
        "text_encoders.clip_h.transformer.", "lora_te_model_transformer_", "transformer.", "",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("other", "layers"),
    [
        ("attn.in_proj", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("attn.out_proj", ["self_attn.out_proj"]),
        ("mlp.c_fc", ["mlp.fc1"]),
        ("mlp.c_proj", ["mlp.fc2"]),
        ("ln_2", ["layer_norm2"]),
    ],
)
def test_names_of_openclip(start: str, other: str, layers: list[str], tiny: Any) -> None:
    """The text encoder has three blocks: OpenCLIP's fourth is the one that is not run, and there is
    no fifth."""
    flat, names = start.startswith("lora_"), Names(tiny)
    for block, wanted in {
        2: tuple(f"text_encoder.encoder.layers.2.{layer}" for layer in layers), 3: (), 4: None
    }.items():  # fmt: skip
        name = f"resblocks.{block}.{other}"
        assert names.find(start + (name.replace(".", "_") if flat else name)) == wanted


def test_a_block_of_openclip_that_is_not_run_is_said(tiny: Any) -> None:
    width = tiny.text_encoder.config.hidden_size
    ends = {"lora_down.weight": torch.ones(2, width), "lora_up.weight": torch.ones(3 * width, 2)}
    start = "cond_stage_model.model.transformer.resblocks"
    tensors = {
        f"{start}.{block}.attn.in_proj_weight.{end}": value
        for block in (2, 3)
        for end, value in ends.items()
    }
    found = read_layers(tensors, tiny)
    assert {path.rpartition(".")[2] for path in found.layers} == {"q_proj", "k_proj", "v_proj"}
    assert found.notes[1].startswith("1 layers are of a block of the text encoder that this")
    with pytest.raises(ValueError, match=r"down of .*in_proj_bias: a trained bias"):
        read_layers({f"{start}.1.attn.in_proj_bias.lora_down.weight": torch.ones(2, 2)}, tiny)


@pytest.mark.parametrize(
    ("name", "part", "other"),
    [
        ("text_encoders.clip_g.transformer.text_model.{}", "text_encoder_2", "clip_l"),
        ("lora_te2_text_model_{flat}", "text_encoder_2", "te1"),
        ("text_encoder_2.text_model.{}", "text_encoder_2", "text_encoder"),
        ("te2.{}", "text_encoder_2", "te"),
        ("lora_te1_text_model_{flat}", "text_encoder", "te2"),
        ("text_encoder.{}", "text_encoder", "text_encoder_2"),
    ],
)
def test_names_of_two_text_encoders(name: str, part: str, other: str, sdxl: Any, tiny: Any) -> None:
    own = "encoder.layers.1.mlp.fc1"
    spelled = name.format(own, flat=own.replace(".", "_"))
    found = Names(sdxl()).find(spelled)
    assert found in ((f"{part}.{own}",), (f"{part}.text_model.{own}",))
    if part == "text_encoder_2":  # a model with one has no such layer
        assert Names(tiny).find(spelled) is None


def test_the_recipe_of_a_file_for_a_named_backbone_has_its_methods_alone(tmp_path: Path) -> None:
    from trainer.config.load import load_recipe
    from trainer.export.start_recipe import write_recipe

    adapter = tmp_path / "mine.safetensors"
    tree = {"backbone": "tiny", "methods": {"lora": {"sites": "cross", "rank": 3}}}
    write_recipe(tmp_path / "my own.yaml", adapter, tree)
    recipe = load_recipe([f"recipe={tmp_path / 'my own.yaml'}", "data.class_word=dog"])
    assert list(recipe.methods) == ["lora"] and recipe.run.start_from == adapter
    assert "my own.yaml' data.concept" in (tmp_path / "my own.yaml").read_text()  # can be pasted


def test_a_recipe_that_cannot_be_written_leaves_nothing(
    kohya_file: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.export import import_ as module

    def full(*_: Any) -> None:
        raise OSError(28, "no space left on device")

    out = tmp_path / "made" / "mine.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_recipe", full)
        with pytest.raises(OSError, match="no space"):
            import_file(kohya_file, str(tiny_folder), out, say=quiet)
    assert list(out.parent.iterdir()) == []
    import_file(kohya_file, str(tiny_folder), out, say=quiet)
    assert sorted(file.name for file in out.parent.iterdir()) == ["mine.safetensors", "mine.yaml"]
