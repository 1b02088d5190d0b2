"""Motion modules: written as diffusers' `MotionAdapter` for its pipeline and under AnimateDiff's
own keys, and read back from both."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.attention import host
from trainer.backbones.long_prompts import Prompts
from trainer.config.header import read_header
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export import motion
from trainer.export.detect import detect
from trainer.export.export import base_of, export
from trainer.export.find_format import format_names
from trainer.export.formats import diffusers
from trainer.export.import_ import import_file
from trainer.export.job import Job
from trainer.export.motion import motion_config
from trainer.export.probe import LIMIT, Probe, difference
from trainer.export.proof import Proof, prove
from trainer.export.refusal import refuse_inserted
from trainer.methods.apply import apply_methods
from trainer.methods.feature.animatediff import AnimateDiff
from trainer.ops.temporal.motion_names import ours, theirs
from trainer.runs.adapter import load_adapted, save_adapter

MODULES: dict[str, Any] = {"animatediff": {"max_frames": 6}}
V1: dict[str, Any] = {"animatediff": {"max_frames": 5, "mid": False}}
BOTH: dict[str, Any] = MODULES | {
    "lora": {"sites": "cross", "rank": 2, "alpha": 3, "text_encoder": ["v", "out"]},
    "new_token": {"tokens": ["<v1>"], "init": "fox"},
}
ANEW: dict[str, Any] = BOTH | {"word_embedding": {"tokens": ["left", "moving"]}}
STILL: dict[str, Any] = {name: ANEW[name] for name in ("lora", "word_embedding")}
INSIDE: dict[str, Any] = MODULES | {
    "lora": {"sites": "all | temporal", "rank": 2, "layers": ["*motion_modules.?.proj_in"]}
}
SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}
FIRST = "down_blocks.0.motion_modules.0"
Make = Callable[..., Path]
Exported = Callable[[dict[str, Any], str], tuple[Path, tuple[str, ...]]]


def quiet(line: str) -> None:
    pass


def numbers(said: Sequence[str]) -> list[float]:
    """The largest differences that were reported."""
    marked = [line.partition("largest difference ")[2] for line in said]
    return [float(rest.split()[0]) for rest in marked if rest]


@pytest.fixture(scope="module")
def moving(
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    open_folder: Callable[[Path], Any],
) -> Make:
    """`moving(tree)`: an adapter with these methods, in which no trained tensor is zero."""
    folder = tmp_path_factory.mktemp("moving")

    def make(tree: dict[str, Any]) -> Path:
        path = folder / f"{abs(hash(str(tree)))}.safetensors"
        if not path.exists():
            model = open_folder(tiny_folder)
            plan = apply_methods(model, methods_of(tree))
            own = dict(model.named_parameters())
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name in plan.names:
                    own[name] += 0.2 * torch.randn(own[name].shape, generator=generator)
            tensors = {name: own[name] for name in plan.stored}
            header = {"backbone": str(tiny_folder), "methods": tree}
            save_adapter(path, tensors, tree=header, identity=model.identity())
        return path

    return make


@pytest.fixture(scope="module")
def exported(moving: Make, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported(tree, name)`: the files of such an adapter in a format, written once into a folder
    `mine`, and the lines that said so."""

    @functools.cache
    def make(tree: str, name: str) -> tuple[Path, tuple[str, ...]]:
        out, said = tmp_path_factory.mktemp("exported") / "mine", list[str]()
        export(moving(json.loads(tree)), out, name, say=said.append)
        return out, tuple(said)

    return lambda tree, name: make(json.dumps(tree), name)


@pytest.fixture
def answer() -> Callable[[Any], Tensor]:
    """`answer(model)`: a model's output for two clips of four frames."""

    def ask(model: Any) -> Tensor:
        size = SimpleNamespace(
            resolution=64, divisor=8, latent_channels=8, prompts=Prompts(None), extras={}
        )
        probe = Probe(size, (), frames=4)
        return probe(model)

    return ask


def encoder_of(out: Path) -> Any:
    from transformers import CLIPTextModel

    return CLIPTextModel.from_pretrained(out / "text_encoder")


def pipeline(folder: Path, out: Path, **parts: Any) -> Any:
    """As a user of diffusers loads it."""
    from diffusers import AnimateDiffPipeline, MotionAdapter

    given = MotionAdapter.from_pretrained(out)
    found = AnimateDiffPipeline.from_pretrained(
        folder, motion_adapter=given, torch_dtype=torch.float32, **parts
    )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.sampled(2)
@pytest.mark.parametrize("tree", [BOTH, ANEW, V1], ids=["lora-and-words", "words-anew", "v1"])
def test_the_stock_pipeline_generates_the_same_clip(
    tree: dict[str, Any], moving: Make, exported: Exported, tiny_folder: Path
) -> None:
    out, said = exported(tree, "diffusers")
    heads = [line.partition(":")[0] for line in said if not line.startswith("this format")]
    assert heads[0] == "diffusers, read back by AnimateDiffPipeline"
    assert heads[1].startswith("the call in README.md gives a picture; ")
    assert max(numbers(said)) <= LIMIT
    given = {"text_encoder": encoder_of(out)} if tree is ANEW else {}
    stock, prompt = pipeline(tiny_folder, out, **given), "a fox moving left"
    if tree is not V1:
        stock.load_lora_weights(out)  # finds its file beside the other
        stock.load_textual_inversion(out / "embeddings", weight_name="v1.safetensors")
        prompt = "a <v1> moving left"
    noise = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(1))  # f c h w
    clip = stock(
        prompt,
        num_frames=3,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=noise.transpose(0, 1)[None],
        output_type="pt",
    ).frames[0]
    adapted, _ = load_adapted(moving(tree))
    clips = Sampling(steps=3, guidance=4.0, frames=3)
    own = sample(adapted, [prompt], [0], settings=clips, start=noise) / 2 + 0.5
    print(f"largest difference of a pixel {float((clip - own).abs().max()):.1e}")
    assert float((clip - own).abs().max()) < 1e-4
    pictures = Sampling(steps=3, guidance=4.0)
    still = sample(adapted, [prompt], [0], settings=pictures, start=noise[:1]) / 2 + 0.5
    assert float((still[0] - own[0]).abs().max()) > 2 / 255


def test_trained_known_words_are_in_the_text_encoder(
    moving: Make, exported: Exported, tiny_folder: Path, tmp_path: Path
) -> None:
    out, _ = exported(ANEW, "diffusers")
    adapted, _ = load_adapted(moving(ANEW))
    learned = adapted.text_encoder.get_input_embeddings().weight.detach()[
        : adapted.tokenizer.vocab_size
    ]
    stock = encoder_of(out).get_input_embeddings().weight.detach()
    base = encoder_of(tiny_folder).get_input_embeddings().weight.detach()
    assert len(stock) == adapted.tokenizer.vocab_size
    assert torch.equal(stock, learned[: len(stock)])
    ids = adapted.tokenizer(["left", "moving"], add_special_tokens=False).input_ids
    moved = (stock != base).any(1).nonzero().flatten().tolist()
    assert moved == sorted(number for row in ids for number in row)
    with pytest.raises(
        ValueError, match="cannot carry 'left', a word of the vocabulary whose"
    ) as e:
        export(moving(STILL), tmp_path / "peft", "peft", say=quiet)
    able = ["comfyui", "diff", "diffusers", "kohya"]
    names = ", ".join(f"format={name}" for name in able)
    assert str(e.value).endswith(f"{names} and format=merged carry it")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["animatediff", "kohya", "comfyui", "diff"])
def test_trained_known_words_are_embeddings_named_like_them(
    name: str, moving: Make, exported: Exported, tiny: Any
) -> None:
    """UIs of the A1111 family use a file's row where a prompt has the token ids of its name."""
    tree = ANEW if name == "animatediff" else STILL
    path, (out, said) = moving(tree), exported(tree, name)
    assert max(numbers(said)) <= LIMIT
    assert "known words were trained: left, moving. Copy the files of" in "\n".join(said)
    assert "`embedding:left`" in "\n".join(said)
    rows = {file.stem: load_file(file) for file in (out / "embeddings").iterdir()}
    assert set(rows) - {"v1"} == {"left", "moving"}
    table = tiny.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for word in ("left", "moving"):
            ((number,),) = tiny.tokenizer([word], add_special_tokens=False).input_ids
            table[number] = rows[word][word]
    adapted, _ = load_adapted(path)
    learned = adapted.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(table, learned[: len(table)])


def test_known_words_come_back_in(
    moving: Make, exported: Exported, tmp_path: Path, tiny_folder: Path
) -> None:
    out, _ = exported(STILL, "kohya")
    said: list[str] = []
    back = import_file(out, str(tiny_folder), tmp_path / "back.safetensors", say=said.append)
    assert any("the known words left, moving" in line for line in said)
    tree, _ = read_header(back)
    assert tree["methods"]["word_embedding"] == {"tokens": ["left", "moving"]}
    adapted, again = load_adapted(moving(STILL))[0], load_adapted(back)[0]
    probe = Probe(adapted, ["left", "moving"])
    assert difference(probe(again), probe(adapted)) <= LIMIT
    file = out / "embeddings" / "left.safetensors"
    alone = import_file(file, str(tiny_folder), tmp_path / "left.safetensors", say=quiet)
    assert read_header(alone)[0]["methods"] == {"word_embedding": {"tokens": ["left"]}}


def test_a_word_that_cannot_name_a_file_is_refused(moving: Make, tmp_path: Path) -> None:
    path = moving({"lora": BOTH["lora"], "word_embedding": {"tokens": ["!"]}})
    with pytest.raises(ValueError, match=r"embedding of '!' was trained, .*; format=diffuser"):
        export(path, tmp_path / "out", "kohya", say=quiet)


def test_the_folder_says_all_that_the_modules_are(
    moving: Make, exported: Exported, tmp_path: Path
) -> None:
    from diffusers import MotionAdapter

    out, _ = exported(BOTH, "diffusers")
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "config.json", diffusers.MODULES, "embeddings", diffusers.FILE
    ]  # fmt: skip
    config = dict(MotionAdapter.load_config(out))
    assert config["block_out_channels"] == [16, 32]
    assert (config["motion_layers_per_block"], config["motion_norm_num_groups"]) == (1, 8)
    assert (config["motion_max_seq_length"], config["motion_num_attention_heads"]) == (6, 8)
    assert not any("motion_modules" in key for key in load_file(out / diffusers.FILE))
    alone = export(moving(V1), tmp_path / "alone", "diffusers", dtype="float16", say=quiet)
    names = ["README.md", "config.json", diffusers.MODULES]
    assert sorted(path.name for path in alone.iterdir()) == names
    assert not MotionAdapter.load_config(alone)["use_motion_mid_block"]
    assert {v.dtype for v in load_file(alone / diffusers.MODULES).values()} == {torch.float16}


def test_on_sd15_the_names_are_those_of_both_readers() -> None:
    from diffusers import MotionAdapter, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_animatediff_checkpoint_to_diffusers,
        infer_diffusers_model_type,
    )

    for version, options in {
        "animatediff_v2": {"mid": True},
        "animatediff_v3": {"mid": False},
        "animatediff_v1": {"mid": False, "max_frames": 24},
    }.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**SD15)
            model: Any = SimpleNamespace(denoiser=unet, denoiser_name="unet")
            model.host = host.Host.attach(unet)
            model.sites = model.host.sites
            model.named_parameters = lambda unet=unet: unet.named_parameters(prefix="unet")
            AnimateDiff(**options).apply(model)
            own = motion.tensors(model)
            made = MotionAdapter(**motion_config(model))
            usual = MotionAdapter().config | {"block_out_channels": [320, 640, 1280, 1280]}
            if version == "animatediff_v2":
                assert motion_config(model).items() <= usual.items()
        wanted = {name: value.shape for name, value in made.state_dict().items()}
        assert {name: value.shape for name, value in own.items()} == wanted
        file = {other: value for name, value in own.items() for other in theirs(name)}
        assert infer_diffusers_model_type(file) == version
        places = {name for name in wanted if name.endswith("pos_embed.pe")}
        assert set(convert_animatediff_checkpoint_to_diffusers(file)) == set(wanted) - places
        assert {ours(name) for name in file} == set(wanted)
        assert len(file) == len(wanted) + len(places)


def test_the_names_are_those_of_the_released_files() -> None:
    block = f"{FIRST}.transformer_blocks.0"
    theirs_block = f"{FIRST}.temporal_transformer.transformer_blocks.0"
    for own, other in {
        f"{FIRST}.norm.bias": [f"{FIRST}.temporal_transformer.norm.bias"],
        f"{block}.norm2.weight": [f"{theirs_block}.norms.1.weight"],
        f"{block}.norm3.weight": [f"{theirs_block}.ff_norm.weight"],
        f"{block}.attn2.to_out.0.bias": [f"{theirs_block}.attention_blocks.1.to_out.0.bias"],
        f"{block}.ff.net.0.proj.weight": [f"{theirs_block}.ff.net.0.proj.weight"],
        f"{block}.pos_embed.pe": [
            f"{theirs_block}.attention_blocks.{place}.pos_encoder.pe" for place in (0, 1)
        ],
    }.items():
        assert list(theirs(own)) == other
        assert {ours(name) for name in other} == {own}
        assert {ours(f"module.{name}") for name in other} == {own}
        assert ours(own) == own


def test_the_original_keys_and_the_image_layers_beside_them(exported: Exported) -> None:
    out, said = exported(BOTH, "animatediff")
    assert said[1].startswith("animatediff, read back by MotionAdapter.from_single_file: ")
    assert said[2].startswith("the call in README.md gives a picture; largest difference ")
    assert max(numbers(said)) <= LIMIT
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors")) == [
        "embeddings/v1.safetensors", "loras/mine.safetensors", "mine.safetensors"
    ]  # fmt: skip
    keys = load_file(out / "mine.safetensors")
    assert all(".temporal_transformer." in key for key in keys)
    assert keys[f"{FIRST}.temporal_transformer.transformer_blocks.0.attention_blocks.1"
                ".pos_encoder.pe"].shape == (1, 6, 16)  # fmt: skip
    beside = load_file(out / "loras" / "mine.safetensors")
    assert all(key.startswith(("lora_unet_", "lora_te_")) for key in beside)


def test_the_difference_of_readers_that_normalise_each_frame_is_reported(
    moving: Make, exported: Exported, answer: Callable[[Any], Tensor]
) -> None:
    """The reference folds the frames into the batch before the norm and back after it."""
    _, said = exported(MODULES, "animatediff")
    adapted, _ = load_adapted(moving(MODULES))
    wanted = answer(adapted)
    for module in motion.modules(adapted).values():
        module.norm.register_forward_pre_hook(
            lambda norm, args: (args[0].transpose(1, 2).flatten(0, 1),)
        )
        module.norm.register_forward_hook(
            lambda norm, args, rows: rows.unflatten(0, (-1, 4)).transpose(1, 2)
        )
    apart = difference(answer(adapted), wanted)
    assert apart > 1e-3
    assert said[0].startswith("AnimateDiff's own code and most UIs normalise each frame of a clip")
    assert float(said[0].rpartition(" ")[2]) == pytest.approx(apart, rel=0.05)


def test_modules_that_normalise_each_frame_are_read_so_and_not_by_diffusers_format(
    moving: Make, exported: Exported, tiny: Any, tmp_path: Path, answer: Callable[[Any], Tensor]
) -> None:
    """The proof is within its limit, the file says how its modules were trained, and `weights`
    reads it there."""
    tree = {"animatediff": {**MODULES["animatediff"], "norm": "frame"}}
    out, said = exported(tree, "animatediff")
    assert not any("normalise" in line for line in said)
    adapted, _ = load_adapted(moving(tree))
    apply_methods(tiny, methods_of({"animatediff": {"weights": str(out / "mine.safetensors")}}))
    assert torch.equal(answer(tiny), answer(adapted))
    assert difference(answer(load_adapted(moving(MODULES))[0]), answer(adapted)) > 1e-3
    with pytest.raises(ValueError, match="format=diffusers cannot carry motion modules that norm"):
        export(moving(tree), tmp_path / "other", "diffusers", say=quiet)


def test_dora_on_the_image_layers_is_a_full_delta_beside_the_modules(
    moving: Make, tmp_path: Path
) -> None:
    tree = MODULES | {"dora": {"sites": "cross", "projections": ["k"], "rank": 2}}
    out = export(moving(tree), tmp_path / "mine", "animatediff", say=quiet)
    beside = load_file(out / "loras" / "mine.safetensors")
    assert all(key.endswith(".diff") for key in beside)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["diffusers", "animatediff"])
def test_lora_inside_modules_that_train_is_folded_in(
    name: str, moving: Make, tmp_path: Path
) -> None:
    out = export(moving(INSIDE), tmp_path / "mine", name, say=quiet)
    for file in out.rglob("*lora*/*.safetensors"):
        assert not any("motion" in key for key in load_file(file))
    files = [path for path in out.rglob("*.safetensors") if "motion" in str(list(load_file(path)))]
    assert len(files) == 1


@pytest.mark.parametrize("name", ["diffusers", "animatediff"])
def test_the_method_reads_it_back(
    name: str, moving: Make, exported: Exported, tiny: Any, answer: Callable[[Any], Tensor]
) -> None:
    out, _ = exported(MODULES, name)
    where = out if name == "diffusers" else out / "mine.safetensors"
    apply_methods(tiny, methods_of({"animatediff": {"weights": str(where)}}))
    adapted, _ = load_adapted(moving(MODULES))
    assert torch.equal(answer(tiny), answer(adapted))


def test_a_checkpoint_of_animatediffs_own_trainer_is_read_once_it_is_converted(
    moving: Make,
    exported: Exported,
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[Any], Tensor],
) -> None:
    """It holds the complete network under `state_dict`, with `module.` before every name."""
    out, _ = exported(MODULES, "animatediff")
    state = {f"module.{k}": v for k, v in load_file(out / "mine.safetensors").items()}
    state |= {f"module.{k}": v for k, v in tiny.unet.state_dict().items()}
    saved = {"epoch": 1, "global_step": 9, "state_dict": state}
    torch.save(saved, tmp_path / "checkpoint.ckpt")
    options = {"weights": str(tmp_path / "checkpoint.ckpt")}
    with pytest.raises(ValueError, match=r"weights=\S+: a pickle, which can run code") as caught:
        apply_methods(tiny, methods_of({"animatediff": options}))
    program, option, code = shlex.split(str(caught.value).partition("convert it once: ")[2])
    assert (program, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    model = load_adapted(moving(MODULES))[0]
    wanted = answer(model)
    base = base_of(read_header(moving(MODULES))[0])
    options = {"weights": str(tmp_path / "checkpoint.safetensors"), "norm": "clip"}
    apply_methods(base, methods_of({"animatediff": options}))
    assert torch.equal(answer(base), wanted)


@pytest.fixture
def motion_tree(moving: Make) -> Callable[..., dict[str, Any]]:
    """`motion_tree(**lora)`: LoRA in motion modules of another run."""

    def make(**lora: Any) -> dict[str, Any]:
        frozen = {"train": False, "weights": str(moving(MODULES))}
        return {
            "animatediff": MODULES["animatediff"] | frozen,
            "lora": {"sites": "temporal", "rank": 2, "alpha": 3} | lora,
        }

    return make


@pytest.fixture
def motion_lora(moving: Make, motion_tree: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """`motion_lora(**lora)`: an adapter of such LoRA."""
    return lambda **lora: moving(motion_tree(**lora))


MOTION_LORA = {"layers": ["*motion_modules.?.transformer_blocks.?.ff.net.2"]}


def test_motion_lora_is_a_lora_for_the_pipeline_with_the_modules_it_was_trained_on(
    motion_tree: Callable[..., dict[str, Any]],
    moving: Make,
    exported: Exported,
    tiny_folder: Path,
    answer: Callable[[Any], Tensor],
) -> None:
    tree = motion_tree(**MOTION_LORA)
    path, (out, said) = moving(tree), exported(tree, "diffusers")
    assert said[0].startswith("methods.animatediff did not train: its layers are those of weights=")
    assert said[1].startswith("this format is for diffusers")
    assert said[2].startswith("diffusers, read back by AnimateDiffPipeline: largest difference ")
    assert max(numbers(said[1:])) <= LIMIT
    assert sorted(item.name for item in out.iterdir()) == ["README.md", diffusers.FILE]
    assert all(".motion_modules." in key for key in load_file(out / diffusers.FILE))
    modules, _ = exported(MODULES, "diffusers")
    stock = pipeline(tiny_folder, modules)
    adapted, _ = load_adapted(path)

    def ask() -> Tensor:
        asked = motion.AnimateDiffModel.__new__(motion.AnimateDiffModel)
        asked.pipeline, asked.encode_prompts = stock, adapted.encode_prompts
        return answer(asked)

    stock.unet.eval()
    assert difference(ask(), answer(adapted)) > 1e-2
    stock.load_lora_weights(out)
    assert difference(ask(), answer(adapted)) <= LIMIT


def test_motion_lora_beside_lora_on_the_image_model_is_one_file(
    motion_lora: Callable[..., Path], tmp_path: Path
) -> None:
    path = motion_lora(sites="temporal | cross")
    said: list[str] = []
    out = export(path, tmp_path / "out", "diffusers", rank=1, say=said.append)
    assert said[1].startswith("rank 1: every layer keeps ")
    keys = list(load_file(out / diffusers.FILE))
    assert {"motion_modules" in key for key in keys} == {True, False}


def test_what_diffusers_cannot_run_is_refused_and_the_other_format_carries_it(
    motion_lora: Callable[..., Path], moving: Make, tmp_path: Path
) -> None:
    path = motion_lora(layers=["*motion_modules.?.proj_in"])
    with pytest.raises(
        ValueError,
        match=r"format=diffusers cannot carry a LoRA of unet\.\S+proj_in: .*; format=animatediff",
    ):
        export(path, tmp_path / "out", "diffusers", say=quiet)
    assert list(tmp_path.iterdir()) == []
    said: list[str] = []
    export(path, tmp_path / "out", "animatediff", say=said.append)
    assert max(numbers(said[1:])) <= LIMIT
    # the reason in the message: the file loads, but the network does not run
    tree, _ = read_header(path)
    adapted, base = load_adapted(path)[0], base_of(tree)
    stock = motion.AnimateDiffModel(base, motion.adapter(base))
    layer = "unet.down_blocks.0.motion_modules.0.proj_in"
    pair = adapted.get_submodule(layer)
    stock.pipeline.load_lora_weights(
        {f"{layer}.lora_{m}.weight": getattr(pair, f"lora_{m}")["lora"].weight for m in "AB"}
    )
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Probe(adapted, (), 4)(stock)


def test_another_number_of_heads_is_refused(moving: Make, tmp_path: Path) -> None:
    path = moving({"animatediff": {"heads": 2}})
    with pytest.raises(ValueError, match=r"cannot carry down_blocks\S+ with 2 heads: .*assumes 8"):
        export(path, tmp_path / "out", "animatediff", say=quiet)
    export(path, tmp_path / "out", "diffusers", say=quiet)


def test_formats_without_a_place_for_modules_name_those_that_have_one(
    moving: Make, tmp_path: Path
) -> None:
    others = [name for name in format_names() if name not in ("animatediff", "diffusers")]
    assert len(others) == len(format_names()) - 2
    adapted, _ = load_adapted(moving(BOTH))
    for name in others:
        with pytest.raises(
            ValueError,
            match=rf"format={name} cannot carry the 7 temporal layers "
            r"\(MotionModule\)$",
        ):
            refuse_inserted(adapted, name)
    with pytest.raises(
        ValueError,
        match=r"format=merged cannot carry the 7 temporal layers \(MotionModule\); "
        "format=animatediff and format=diffusers carry it$",
    ):
        export(moving(BOTH), tmp_path / "out", say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_no_format_carries_other_temporal_layers(tiny: Any) -> None:
    apply_methods(tiny, methods_of({"vdm": {}}))
    for name in format_names():
        with pytest.raises(ValueError, match=r"temporal layers \(TemporalAttention\)$"):
            refuse_inserted(tiny, name)


def test_no_format_carries_modules_of_a_transformer(dit: Any) -> None:
    AnimateDiff(heads=2).apply(dit)
    with pytest.raises(ValueError, match="diffusers cannot carry the 2 temporal "):
        refuse_inserted(dit, "diffusers")


def test_a_rank_is_for_lora_alone(moving: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rank=1 reduces changes of existing layers, and this"):
        export(moving(BOTH), tmp_path / "out", "diffusers", rank=1, say=quiet)


def test_original_keys_want_motion_modules(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is for motion modules, and this adapter has none"):
        export(trained("lora"), tmp_path / "out", "animatediff", say=quiet)


@pytest.mark.parametrize("name", ["diffusers", "animatediff"])
def test_modules_that_load_and_do_nothing_are_refused(
    name: str, moving: Make, exported: Exported, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(exported(MODULES, name)[0], tmp_path / "mine"))
    (file,) = out.glob("*.safetensors")
    zero = {k: v * (0 if "proj_out" in k else 1) for k, v in load_file(file).items()}
    save_file(zero, file, {"format": "pt"})
    adapted, tree = load_adapted(moving(MODULES))
    probe = Probe(adapted, (), 4)
    proof = Proof(name, lambda: base_of(tree), probe=probe, wanted=probe(adapted), say=quiet)
    with pytest.raises(ValueError, match=r"differs by \S+ from the model's, and \S+ is allowed"):
        prove(proof, out)


def test_an_op_that_acts_on_clips_is_named(moving: Make, tmp_path: Path) -> None:
    tree = MODULES | {"text2video_zero": {}}
    with pytest.raises(ValueError, match=r"cannot carry text2video_zero \(on \S+\): it acts in"):
        export(moving(tree), tmp_path / "out", "diffusers", say=quiet)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("trained_here", [True, False], ids=["modules", "motion_lora"])
@pytest.mark.parametrize("name", ["diffusers", "animatediff"])
def test_a_base_in_four_bits(name: str, trained_here: bool, moving: Make, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tree = MODULES | {"nf4": {"min_size": 256}}
    if not trained_here:
        frozen = {"train": False, "weights": str(moving(MODULES))}
        tree |= {"animatediff": MODULES["animatediff"] | frozen}
        tree |= {"lora": {"sites": "temporal", "rank": 2}}
    said: list[str] = []
    export(moving(tree), tmp_path / "out", name, say=said.append)
    assert any(line.startswith("proven on the base as methods.nf4 stores it") for line in said)


def test_import_reads_the_lora_and_says_what_reads_the_modules(
    exported: Exported, tiny_folder: Path, tmp_path: Path
) -> None:
    out, _ = exported(BOTH, "diffusers")
    said: list[str] = []
    import_file(out, str(tiny_folder), tmp_path / "back.safetensors", say=said.append)
    assert said[0] == f"its motion modules are read by methods.animatediff.weights={out}"
    alone, _ = exported(V1, "diffusers")
    original, _ = exported(V1, "animatediff")
    for where in (alone, original, original / "mine.safetensors"):
        assert detect(where) == "animatediff"
        with pytest.raises(
            ValueError, match=r"start from them, train with methods\.animatediff\.wei"
        ):
            import_file(where, str(tiny_folder), tmp_path / "none", say=quiet)


def test_import_refuses_a_motion_lora(
    motion_tree: Callable[..., dict[str, Any]],
    exported: Exported,
    tiny_folder: Path,
    tmp_path: Path,
) -> None:
    out, _ = exported(motion_tree(**MOTION_LORA), "diffusers")
    with pytest.raises(ValueError, match="is a MotionLoRA, which changes motion modules, and"):
        import_file(out, str(tiny_folder), tmp_path / "none", say=quiet)


def test_nothing_of_the_modules_is_left_in_the_bundle(
    moving: Make, tiny_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    """The modules are written separately, so that nothing is dropped."""
    adapted, _ = load_adapted(moving(BOTH))
    stored = tuple(load_file(moving(BOTH)))
    job = Job(adapted, lambda: open_folder(tiny_folder), stored=stored, title="title")
    assert job.inserts
    assert job.bundle.dropped == ()
    assert not any("motion" in path for path in job.bundle.layers)
    assert list(job.bundle.tokens) == ["<v1>"]
