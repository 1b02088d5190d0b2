"""Families whose text encoder is a language model, Z-Image and Qwen-Image, against stock diffusers:
prompts, predictions, pictures; what trains and is read back; what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import flow_checks as checks
import pytest
import torch
from chat_folders import qwen_image_pipeline, z_image_pipeline
from edited import edit
from flow_folders import make_flow_folder
from torch import Tensor
from two_steps import two_steps

from trainer.backbones import load_backbone
from trainer.backbones.families import family_of
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.data.loader import Batch
from trainer.diffusion.guidance import COND, UNCOND, classifier_free
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted
from trainer.runs.sum_adapters import load_summed
from trainer.training.tasks.denoise import Denoise

Open = Callable[[Path], Any]
PROMPTS = ["a fox on a red background", "an apple"]  # of different lengths
SEEDS = [3, 4]
STEPS = 3
CLOSE = 0.2 / 255  # what guidance rescales in the tiny Qwen-Image is 1.7 / 255
HEIGHT, WIDTH = 16, 24  # in pixels, of which two are a latent along each edge


@dataclass(frozen=True)
class Case:
    """A family: its stock pipeline, and the options of its call for our guidance."""

    make: Callable[..., Any]
    pipeline: str
    guided: Callable[[float, str], dict[str, Any]]


CASES = {
    "z_image": Case(
        z_image_pipeline,
        "ZImagePipeline",
        lambda scale, text: {"guidance_scale": scale - 1, "negative_prompt": [text] * 2},
    ),
    "qwen_image": Case(
        qwen_image_pipeline,
        "QwenImagePipeline",
        lambda scale, text: {"true_cfg_scale": scale, "negative_prompt": [text] * 2},
    ),
}
FAMILIES = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("backbone")
    return {name: make_flow_folder(base / name, case.make) for name, case in CASES.items()}


@pytest.fixture
def copy(name: str, folders: dict[str, Path], tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(folders[name], tmp_path / "copy"))


def stock(name: str, folder: Path) -> Any:
    pipe: Any = getattr(diffusers, CASES[name].pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(*shape: int) -> Tensor:
    return torch.cat(
        [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS]
    )


def painted(name: str, pipe: Any, guidance: float = 4.0, negative: str = "") -> Tensor:
    """What a stock pipeline makes from the noise of the seeds."""
    x_t = noise(4, HEIGHT // 2, WIDTH // 2)
    if name == "qwen_image":
        x_t = pipe._pack_latents(x_t, 2, 4, HEIGHT // 2, WIDTH // 2)
    pictures: Tensor = pipe(
        list(PROMPTS), latents=x_t, num_inference_steps=STEPS, height=HEIGHT, width=WIDTH,
        output_type="pt", **CASES[name].guided(guidance, negative),
    ).images  # fmt: skip
    return pictures


def drawn(
    model: Any, guidance: float = 4.0, *, prompts: list[str] = PROMPTS, **options: Any
) -> Tensor:
    how = Sampling(STEPS, guidance, size=(HEIGHT, WIDTH), **options)
    return sample(model, prompts, SEEDS, settings=how) / 2 + 0.5


def batch_of(step: int = 0) -> Batch:
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
    words = ["a <v1> fox", "a cat"]
    return Batch(step, [0, 1], words, words, torch.ones(2), pixels=pixels)


def task_of(model: Any) -> Denoise:
    return Denoise(model, Objective(model.target, model.alphas_cumprod))


def trained(model: Any, tree: dict[str, Any], path: Path, folder: Path) -> Path:
    """The adapter of methods that take two steps on random pictures."""
    run = {"resolution": 16}
    return two_steps(model, tree, path, folder=folder, batch_of=batch_of, lr=0.1, run=run)


@FAMILIES
def test_a_folder_says_its_family(name: str, folders: dict[str, Path], open_folder: Open) -> None:
    model = open_folder(folders[name])
    assert family_of(folders[name]) == model.family == name
    assert (model.target, model.alphas_cumprod) == ("flow", None)
    assert (model.divisor, model.multiple, model.latent_channels) == (2, 4, 4)
    assert model.text_width == 16
    assert model.text_length == {"z_image": 512, "qwen_image": 1024}[name]
    first = {"z_image": 3, "qwen_image": 0}[name]  # of the prompt, after the template
    assert model.prompts.places("left fox", "left") == [first]
    assert model.prompts.places("a left fox", "left") == [first + 1]
    assert model.prompts.reader.holds("a left fox", "left") is None
    assert len(model.blocks()) == {"z_image": 4, "qwen_image": 2}[name]
    checks.check_folder_facts(model, folders[name])


@FAMILIES
def test_text_lies_where_it_is_declared(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    checks.text_lies_where_declared(open_folder(folders[name]))


@torch.no_grad()
@FAMILIES
def test_prompts_are_those_of_the_stock_pipeline(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    """Of each prompt as many tokens, and no more; the empty one too."""
    model, pipe = open_folder(folders[name]), stock(name, folders[name])
    texts = [*PROMPTS, ""]
    own = model.encode_prompts(texts)
    assert set(own.tensors()) == {"tokens", "mask"}
    if name == "z_image":
        wanted = pipe.encode_prompt(list(texts), do_classifier_free_guidance=False)[0]
    else:
        tokens, mask = pipe.encode_prompt(texts)
        assert torch.equal(own.mask, mask)
        wanted = [row[kept.bool()] for row, kept in zip(tokens, mask, strict=True)]
    assert [len(row) for row in wanted] == own.mask.sum(1).tolist()
    for row, found in zip(wanted, own.tokens, strict=True):
        torch.testing.assert_close(found[: len(row)], row, rtol=0, atol=1e-5)
        assert not found[len(row) :].any()


@torch.no_grad()
@FAMILIES
def test_a_prediction_is_the_call_of_the_stock_network(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    model = open_folder(folders[name])
    pipe, x_t, t = stock(name, folders[name]), noise(4, 8, 12), torch.tensor([3.0, 700.0])
    if name == "z_image":
        text = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)[0]
        pictures = [picture[:, None] for picture in x_t]
        found = pipe.transformer(pictures, 1 - t / 1000, text).sample
        wanted = -torch.stack(found)[:, :, 0]
    else:
        text, mask = pipe.encode_prompt(PROMPTS)
        found = pipe.transformer(
            pipe._pack_latents(x_t, 2, 4, 8, 12), text, mask, timestep=t / 1000,
            img_shapes=[[(1, 4, 6)]] * 2,
        ).sample  # fmt: skip
        wanted = pipe._unpack_latents(found, 16, 24, 2)[:, :, 0]
    plain = model.predict(x_t, t, model.encode_prompts(PROMPTS))
    torch.testing.assert_close(plain, wanted, rtol=0, atol=1e-5)
    assert float(plain.std()) > 1e-2


@FAMILIES
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (4.0, ""), (3.0, "an owl, left")])
def test_pictures_are_those_of_the_stock_pipeline(
    name: str, guidance: float, negative: str, folders: dict[str, Path], open_folder: Open
) -> None:
    model, pipe = open_folder(folders[name]), stock(name, folders[name])
    wanted = painted(name, pipe, guidance, negative)
    own = drawn(model, guidance, negative=negative)
    assert float((own - wanted).abs().max()) <= CLOSE
    assert float(wanted.std()) > 0.05


@FAMILIES
def test_a_picture_becomes_latents_and_a_picture_again(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    """Latents as the stock pipelines have them: scaled by the VAE's numbers, of each channel where
    these are lists."""
    model = open_folder(folders[name])
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    moments = model.moments(pixels)
    assert moments.shape == (2, 8, 8, 12)
    x0 = model.latents(moments, torch.zeros(2, 4, 8, 12))
    config, mean = model.vae.config, moments[:, :4]
    if name == "z_image":
        wanted = (mean - config.shift_factor) * config.scaling_factor
    else:
        own, std = (
            torch.tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        wanted = (mean - own) / std
        torch.testing.assert_close(
            mean, model.vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
        )
    torch.testing.assert_close(x0, wanted)


@FAMILIES
def test_the_loss_is_that_of_a_flow(name: str, folders: dict[str, Path], open_folder: Open) -> None:
    """x_t = (1 - t) x0 + t noise, target noise - x0: written out."""
    model = open_folder(folders[name])
    task = task_of(model)
    state = task.encode(batch_of())
    share = (state.t / 1000)[:, None, None, None]
    torch.testing.assert_close(state.x_t, (1 - share) * state.x0 + share * state.noise)
    result = task.loss(state)
    error = (result.output - (state.noise - state.x0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result.losses, error)


def test_guidance_of_qwen_image_keeps_the_length_of_a_token() -> None:
    from trainer.backbones.qwen_image import rescaled

    uncond, cond = torch.randn(2, 2, 4, 4, 6).unbind(0)
    own = classifier_free({UNCOND: uncond, COND: cond}, 3.0, rescaled)
    made = uncond + 3 * (cond - uncond)
    for row in range(2):
        for y in range(0, 4, 2):
            for x in range(0, 6, 2):
                at = (row, slice(None), slice(y, y + 2), slice(x, x + 2))
                wanted = made[at] * cond[at].norm() / made[at].norm()
                torch.testing.assert_close(own[at], wanted)


def test_turbo_samples_and_is_not_trained(tmp_path: Path, open_folder: Open) -> None:
    folder = make_flow_folder(tmp_path / "turbo", z_image_pipeline, shift=3.0)
    words = ["recipe=lora", f"backbone={folder}", "data.prior_weight=0", "run.resolution=16"]
    with pytest.raises(RecipeError, match=r"Turbo was distilled .* train on z_image"):
        load_recipe(words)
    wanted = painted("z_image", stock("z_image", folder), 1.0)
    assert float((drawn(open_folder(folder), 1.0) - wanted).abs().max()) <= CLOSE


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 2}},
    "dora": {"dora": {"sites": "joint", "rank": 2}},
    "text": {"lora": {"sites": "joint", "rank": 2, "text_encoder": ["q", "v"]}},
    "word": {"new_token": {"tokens": ["<v1>"], "init": "fox"}},
    "words": {"new_token": {"tokens": ["<v1>", "<v1>_1"], "init": "fox"}},
    "known": {"word_embedding": {"tokens": ["fox"]}},
    "custom_diffusion": {
        "selective": {"detach_first_token": True},
        "new_token": {"tokens": ["<v1>"], "init": "fox"},
    },
}


@FAMILIES
@pytest.mark.parametrize("method", METHODS)
def test_what_trains_is_saved_and_read_again(
    name: str, method: str, folders: dict[str, Path], open_folder: Open, tmp_path: Path
) -> None:
    model = open_folder(folders[name])
    prompts = ["a <v1> fox", "a cat"]
    base = model.encode_prompts(prompts)
    path = trained(model, METHODS[method], tmp_path / "a.safetensors", folders[name])
    wanted = drawn(model.eval(), prompts=prompts)
    loaded, _ = load_adapted(path)
    assert torch.equal(drawn(loaded.eval(), prompts=prompts), wanted)
    now = loaded.encode_prompts(prompts)
    told = method not in ("lora", "dora")
    assert (
        now.tokens.shape != base.tokens.shape or not torch.equal(now.tokens, base.tokens)
    ) == told
    if "new_token" in METHODS[method]:
        rows = loaded.text_encoder.get_input_embeddings().stacked()
        ids = loaded.tokenizer(" fox").input_ids
        start = loaded.text_encoder.get_input_embeddings().table.weight[ids]
        assert float((rows - start).abs().max()) > 1e-3, "the word has learned nothing"


def test_what_z_image_learns_of_the_text_alone_has_no_place_in_a_file(
    folders: dict[str, Path], open_folder: Open, tmp_path: Path
) -> None:
    """Its layers read image and text by the same weights, which a file could only change for
    both."""
    folder = folders["z_image"]
    path = trained(open_folder(folder), {"selective": {}}, tmp_path / "a.safetensors", folder)
    with pytest.raises(ValueError, match=r"cannot carry text_span \(on layers.*generate with"):
        export(path, tmp_path / "out", "diffusers", say=lambda _: None)
    with pytest.raises(ValueError, match=r"has transformer\.layers.*text_span.*; use it alone"):
        load_summed([path, path], (1.0, 1.0))


@pytest.mark.sampled(3)
@FAMILIES
@pytest.mark.parametrize(
    ("method", "written"),
    [
        ("lora", "diffusers"),
        ("lora", "comfyui"),
        ("lora", "kohya"),
        ("lora", "peft"),
        ("lora", "merged"),
        ("dora", "diffusers"),
        ("text", "peft"),
        ("word", "merged"),
        ("word", "diffusers"),
        ("words", "diffusers"),
        ("words", "peft"),
        ("known", "merged"),
        ("known", "diffusers"),
    ],
)
def test_exports_are_proven(
    name: str,
    method: str,
    written: str,
    folders: dict[str, Path],
    open_folder: Open,
    tmp_path: Path,
) -> None:
    model = open_folder(folders[name])
    path = trained(model, METHODS[method], tmp_path / "a.safetensors", folders[name])
    lines: list[str] = []
    out = export(path, tmp_path / "out", written, say=lines.append)
    assert any("largest difference" in line for line in lines)
    if written == "comfyui":  # which is no python
        assert any("read back by load_lora_weights" in line for line in lines)
        return
    assert any("the call in README.md gives a picture" in line for line in lines)
    call = (out / "README.md").read_text()
    assert ("'a photo of <v1> <v1>_1'" in call) == (method == "words")
    assert ("negative_prompt=''" in call) == (name == "qwen_image")


@FAMILIES
def test_a_stock_pipeline_paints_with_the_adapter(
    name: str, folders: dict[str, Path], open_folder: Open, tmp_path: Path
) -> None:
    model, pipe = open_folder(folders[name]), stock(name, folders[name])
    base = painted(name, pipe)
    path = trained(model, METHODS["lora"], tmp_path / "a.safetensors", folders[name])
    pipe.load_lora_weights(export(path, tmp_path / "out", "diffusers", say=lambda line: None))
    wanted = drawn(model.eval())
    assert float((painted(name, pipe) - wanted).abs().max()) <= CLOSE
    assert float((base - wanted).abs().max()) > 20 * CLOSE


@FAMILIES
def test_a_recipe_trains_it(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from trainer.runs.adapter import load_adapted as load
    from trainer.training.fit import fit

    words = [
        "recipe=lora", f"backbone={folders[name]}", "data.prior_weight=0", "run.resolution=16",
        "run.steps=2", "run.batch_size=2", "run.validate_every=0", "preview.every=0",
        f"run.out={tmp_path}", "optim.lr=0.01",
    ]  # fmt: skip
    folder = fit(load_recipe(words))
    model, _ = load(folder / "adapter.safetensors")
    ups = {key: up for key, up in model.named_parameters() if "lora_B" in key}
    dead = {key for key, up in ups.items() if not up.any()}
    # text that comes out of the last block is read by nothing
    last = "transformer_blocks.1.attn"
    assert ups and all(f"{last}.add_q" in key or f"{last}.to_add_out" in key for key in dead)


@FAMILIES
def test_a_text_encoder_that_is_calculated_again_has_the_same_gradients(
    name: str, folders: dict[str, Path], open_folder: Open
) -> None:
    """A language model keeps keys and values, which are not to be there twice."""
    model = open_folder(folders[name])
    plan = apply_methods(model.eval(), methods_of({"new_token": {"tokens": ["<v1>"]}}))
    trained = [model.get_parameter(each) for each in plan.names]

    def gradients() -> list[Tensor]:
        tokens = model.encode_prompts(["a <v1>", "left"]).tokens
        return list(torch.autograd.grad(tokens.square().sum(), trained))

    wanted = gradients()
    model.enable_gradient_checkpointing()
    assert all(map(torch.equal, gradients(), wanted))
    assert any(each.any() for each in wanted)


def test_a_prompt_that_is_too_long_is_cut_as_in_the_stock_pipeline(
    folders: dict[str, Path], open_folder: Open
) -> None:
    """Z-Image: 512 tokens with the template's own."""
    model, pipe = open_folder(folders["z_image"]), stock("z_image", folders["z_image"])
    long = "fox " * 600
    with torch.no_grad():
        wanted = pipe.encode_prompt([long], do_classifier_free_guidance=False)[0][0]
        own = model.encode_prompts([long]).tokens[0]
    assert own.shape == (512, 16)
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)


@FAMILIES
def test_check_reads_a_folder_without_torch(name: str, folders: dict[str, Path]) -> None:
    """And counts the tokens of a prompt as the text encoder does."""
    code = (
        "import sys; from trainer.config.load import load_recipe\n"
        "from trainer.backbones.prompt_tokens import prompt_reader\n"
        f"found = load_recipe(['recipe=lora', 'backbone={folders[name]}', 'data.prior_weight=0'])\n"
        "print(prompt_reader(found.backbone).chunk)\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    chunk = {"z_image": 512 - 8, "qwen_image": 1024 - 5}[name]
    assert printed.stdout.split("\n")[:2] == [str(chunk), "set()"]


@pytest.mark.parametrize(
    ("backbone", "family", "hub"),
    [
        ("z_image", "z_image", "Tongyi-MAI/Z-Image"),
        ("z_image_turbo", "z_image", "Tongyi-MAI/Z-Image-Turbo"),
        ("qwen_image", "qwen_image", "Qwen/Qwen-Image"),
    ],
)
def test_the_backbones_of_the_hub_are_pinned(backbone: str, family: str, hub: str) -> None:
    spec = backbone_spec(backbone)
    assert (spec.family, spec.hub) == (family, hub)
    assert spec.revision is not None and len(spec.revision) == 40


def _file(path: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / path, **changes)


NETWORK, INDEX = "transformer/config.json", "model_index.json"
REFUSED: dict[tuple[str, str], tuple[Callable[[Path], None], str]] = {
    ("z_image", "omni"): (_file(NETWORK, siglip_feat_dim=8), "also reads pictures"),
    ("z_image", "patch"): (_file(NETWORK, all_patch_size=[4]), r"has tokens of \[4\] latents"),
    ("z_image", "width"): (_file(NETWORK, cap_feat_dim=24), "reads text of width 24,"),
    ("z_image", "channels"): (_file(NETWORK, in_channels=16), "takes 16 channels"),
    ("z_image", "text"): (
        _file(INDEX, text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is a T5EncoderModel of transformers; this family has Qwen3Model",
    ),
    ("z_image", "path"): (
        _file("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "scheduler is a DDIMScheduler .* trained on a flow",
    ),
    ("qwen_image", "edit"): (_file(NETWORK, zero_cond_t=True), "has zero_cond_t, as models that"),
    ("qwen_image", "width"): (_file(NETWORK, joint_attention_dim=24), "reads text of width 24"),
    ("qwen_image", "channels"): (_file(NETWORK, in_channels=64), "takes 64 channels"),
    ("qwen_image", "vae"): (
        _file("vae/config.json", _class_name="AutoencoderKL"),
        "vae is a AutoencoderKL; these are known: AutoencoderKLQwenImage",
    ),
    ("qwen_image", "folder"): (
        lambda folder: shutil.rmtree(folder / "text_encoder"),
        r"text_encoder: config\.json is missing",
    ),
    ("qwen_image", "pipeline"): (
        _file(INDEX, _class_name="QwenImageEditPipeline"), "is a QwenImageEditPipeline",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "what"), REFUSED)
def test_what_it_cannot_load_is_refused(name: str, what: str, copy: Path) -> None:
    spoil, message = REFUSED[name, what]
    spoil(copy)
    with pytest.raises((RecipeError, ValueError), match=message):
        backbone_spec(str(copy))


@pytest.mark.parametrize("name", ["z_image"])
def test_another_chat_template_is_refused(name: str, copy: Path) -> None:
    template = copy / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "model"))
    with pytest.raises(ValueError, match=r"the chat template of its tokenizer gives .*model"):
        load_backbone(backbone_spec(str(copy)), str(copy))
    template.unlink()
    with pytest.raises(ValueError, match="gives None for the prompt"):
        load_backbone(backbone_spec(str(copy)), str(copy))


@pytest.mark.parametrize("name", ["qwen_image"])
def test_words_are_added_to_a_table_with_spare_rows(
    name: str, tmp_path: Path, folders: dict[str, Path]
) -> None:
    """The published tables have more rows than their tokenizers have tokens."""
    pipe = stock(name, folders[name])
    count = len(pipe.tokenizer)
    pipe.text_encoder.resize_token_embeddings(count + 3, mean_resizing=False)
    folder = tmp_path / "spare"
    pipe.save_pretrained(folder)
    model = load_backbone(backbone_spec(str(folder)), str(folder)).eval()
    path = trained(model, METHODS["words"], tmp_path / "a.safetensors", folder)
    table = model.text_encoder.get_input_embeddings()
    ids = torch.arange(count + 3)
    assert model.tokenizer.convert_tokens_to_ids(["<v1>", "<v1>_1"]) == [count, count + 1]
    wanted = table.table.weight.clone()
    wanted[count : count + 2] = table.stacked()
    assert torch.equal(table(ids), wanted) and torch.equal(table.weight, wanted)
    assert table.num_embeddings == count + 3
    loaded, _ = load_adapted(path)
    prompts = ["a <v1> fox", "a cat"]
    assert torch.equal(drawn(loaded.eval(), prompts=prompts), drawn(model.eval(), prompts=prompts))
    lines: list[str] = []
    export(path, tmp_path / "out", "merged", say=lines.append)
    assert any("the call in README.md gives a picture" in line for line in lines)
