"""The family of Stable Diffusion XL against stock diffusers: prompts, predictions, pictures; what
it is told of size and crop; what trains and is read back; what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from edited import edit
from PIL import Image
from sdxl_folder import make_sdxl_folder
from torch import Tensor
from two_steps import two_steps

from trainer.attention.condition import Condition
from trainer.backbones import load_backbone
from trainer.backbones.device import Placement, place
from trainer.backbones.families import family_of
from trainer.backbones.sdxl import FAMILY, encode_crop
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted
from trainer.training.fit import fit
from trainer.training.step_memory import step_bytes
from trainer.training.tasks.denoise import Denoise

PROMPTS = ["a fox on a red background", "an apple left of a cat"]
SEEDS = [3, 4]
STEPS = 4
CLOSE = 2 / 255
Open = Callable[[Path], Any]


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl_folder(tmp_path_factory.mktemp("backbone") / "sdxl")


@pytest.fixture
def sdxl(sdxl_folder: Path, open_folder: Open) -> Any:
    """A fresh backbone that a test may edit."""
    return open_folder(sdxl_folder)


@pytest.fixture
def copy(sdxl_folder: Path, tmp_path: Path) -> Path:
    """A pipeline folder that a test may spoil."""
    return Path(shutil.copytree(sdxl_folder, tmp_path / "copy"))


def stock(folder: Path) -> Any:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(seeds: list[int], *shape: int) -> Tensor:
    return torch.cat(
        [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def painted(pipe: Any, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    """What a stock pipeline makes from the noise of the seeds, 32 by 48 pixels."""
    own = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": 32, "width": 48}
    x_t = noise(SEEDS, 8, 8, 12)
    pictures: Tensor = pipe(prompts, latents=x_t, output_type="pt", **(own | options)).images
    return pictures


def drawn(model: Any, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    how = Sampling(STEPS, options.pop("guidance", 4.0), size=(32, 48), **options)
    return sample(model, prompts, SEEDS, settings=how) / 2 + 0.5


def trained(model: Any, tree: dict[str, Any], path: Path, folder: Path) -> Path:
    """The adapter of methods that take two steps on random pictures."""
    return two_steps(model, tree, path, folder=folder, batch_of=batch_of, lr=2e-2)


def batch_of(step: int = 0, **more: Any) -> Batch:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
    words = ["a <v1> fox", "a cat"]
    return Batch(step, [0, 1], words, words, torch.ones(2), pixels=pixels, **more)


def test_a_folder_says_its_family(sdxl: Any, sdxl_folder: Path) -> None:
    assert family_of(sdxl_folder) == sdxl.family == "sdxl"
    assert list(sdxl.text_encoders) == list(sdxl.tokenizers) == ["text_encoder", "text_encoder_2"]
    assert sdxl.text_shapes == {"tokens": (32, 80), "pooled": (24,)}
    assert (sdxl.text_width, sdxl.text_length, sdxl.resolution) == (80, 32, 32)
    names = {name.partition(".")[0] for name, _ in sdxl.named_parameters()}
    assert names == {"unet", "text_encoder", "text_encoder_2", "vae"}
    assert set(sdxl.identity()) == {
        "family", "name", "unet", "text_encoder", "text_encoder_2", "target"
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_prompts_are_those_of_the_stock_pipeline(
    zeros: bool, copy: Path, open_folder: Open
) -> None:
    """The unconditional rows too: zeros where the pipeline says so, else those of no words."""
    edit(copy / "model_index.json", force_zeros_for_empty_prompt=zeros)
    model, pipe = load_backbone(backbone_spec(str(copy)), str(copy)).eval(), stock(copy)
    assert pipe.tokenizer.pad_token_id != pipe.tokenizer_2.pad_token_id
    text, empty, pooled, pooled_empty = pipe.encode_prompt(PROMPTS)
    own = model.encode_prompts([*PROMPTS, "", ""])
    torch.testing.assert_close(own.tokens, torch.cat([text, empty]), rtol=0, atol=1e-6)
    torch.testing.assert_close(own.pooled, torch.cat([pooled, pooled_empty]), rtol=0, atol=1e-6)
    assert bool(own.tokens[2:].any()) == bool(own.pooled[2:].any()) == (not zeros)
    assert set(own.tensors()) == {"tokens", "pooled"}
    assert model.pipeline().config.force_zeros_for_empty_prompt == zeros


@torch.no_grad()
def test_a_prediction_is_the_call_of_the_stock_network(sdxl: Any, sdxl_folder: Path) -> None:
    pipe = stock(sdxl_folder)
    x_t, t = noise(SEEDS, 8, 8, 12), torch.tensor([3, 700])
    text, _, pooled, _ = pipe.encode_prompt(PROMPTS)

    def wanted(time_ids: list[int]) -> Tensor:
        added = {"text_embeds": pooled, "time_ids": torch.tensor([time_ids, time_ids]).float()}
        output: Tensor = pipe.unet(x_t, t, text, added_cond_kwargs=added).sample
        return output

    crop = [300, 200, 5, 9, 64, 48]
    encoded = sdxl.encode({"text": PROMPTS, "crop": torch.tensor([crop, crop]).float()})
    plain = sdxl.predict(x_t, t, sdxl.encode_prompts(PROMPTS))
    told = sdxl.predict(x_t, t, encoded)
    torch.testing.assert_close(plain, wanted([32, 48, 0, 0, 32, 48]), rtol=0, atol=1e-5)
    torch.testing.assert_close(told, wanted(crop), rtol=0, atol=1e-5)
    assert float((plain - told).abs().max()) > 1e-3


@pytest.mark.parametrize("solver", [None, "euler"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_stock_pipeline(
    solver: str | None, guidance: float, sdxl: Any, sdxl_folder: Path
) -> None:
    """With the solver of the checkpoint, Euler, and with this toolkit's own, DDIM."""
    pipe = stock(sdxl_folder)
    if solver is None:
        pipe.scheduler = sdxl.scheduler()
    wanted = painted(pipe, guidance_scale=guidance)
    own = drawn(sdxl, guidance=guidance, sampler=solver)
    assert float((own - wanted).abs().max()) <= CLOSE
    assert float(wanted.std()) > 0.05


def test_a_negative_prompt_is_read(sdxl: Any, sdxl_folder: Path) -> None:
    pipe = stock(sdxl_folder)
    wanted = painted(pipe, negative_prompt=["a tree"] * 2, guidance_scale=9.0)
    own = drawn(sdxl, guidance=9.0, sampler="euler", negative="a tree")
    assert float((own - wanted).abs().max()) <= CLOSE
    assert float((own - drawn(sdxl, guidance=9.0, sampler="euler")).abs().max()) > 1e-3


@torch.no_grad()
def test_v_and_levels_to_pure_noise_come_from_the_scheduler(copy: Path) -> None:
    """As forks have it (NoobAI's v-prediction)."""
    file = copy / "scheduler" / "scheduler_config.json"
    edit(file, prediction_type="v_prediction", rescale_betas_zero_snr=True,
         timestep_spacing="trailing")  # fmt: skip
    model = load_backbone(backbone_spec(str(copy)), str(copy)).eval()
    assert model.target == "v"
    assert model.alphas_cumprod is not None and float(model.alphas_cumprod[-1]) == 0
    pipe = stock(copy)
    pipe.scheduler = model.scheduler()
    assert float((drawn(model) - painted(pipe)).abs().max()) <= CLOSE


def test_the_crop_of_a_sample_reaches_the_network(sdxl: Any) -> None:
    task = Denoise(sdxl, Objective(sdxl.target, sdxl.alphas_cumprod))
    crops = torch.tensor([[900.0, 600, 10, 0, 32, 32], [32, 32, 0, 0, 32, 32]])
    with torch.no_grad():
        state = task.encode(batch_of(inputs={"crop": crops, "unknown": crops}))
        told = task.loss(state).losses
        plain = task.loss(task.encode(batch_of())).losses
    assert torch.equal(state.condition.crop, crops)
    assert float((told - plain)[0].abs()) > 1e-5
    torch.testing.assert_close(told[1], plain[1])
    clip = state.condition.per_frame(2).crop
    assert clip is not None and torch.equal(clip[:2], crops[:1].expand(2, 6))


def test_a_run_tells_the_network_what_its_photos_show(
    sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in validation; other families have no encoder of it, and are not told."""
    seen: list[list[float]] = []

    def noting(backbone: Any, crops: Tensor) -> Any:
        seen.extend(crops.tolist())
        return encode_crop(backbone, crops)

    monkeypatch.setitem(FAMILY.encoders, "crop", noting)
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (48, 40 + number), (90, 60, 30 * number)).save(photos / f"{number}.png")
    words = [
        "recipe=lora", f"backbone={sdxl_folder}", "data.source=folder", f"data.folder={photos}",
        "data.template=a fox", "data.validation=1", "methods.new_token=null", "run.resolution=32",
        "run.steps=2", "run.batch_size=1", "run.validate_every=1", "preview.every=0",
        f"run.out={tmp_path}",
    ]  # fmt: skip
    fit(load_recipe(words))
    assert len({height for height, *_ in seen}) == 3 and {crop[1] for crop in seen} == {48}
    assert {tuple(crop[4:]) for crop in seen} == {(32, 32)}


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 2, "text_encoder": ["q", "v", "fc1"]}},
    "custom_diffusion": {
        "selective": {"sites": "cross", "projections": ["k", "v"]},
        "new_token": {"tokens": ["<v1>"], "init": "fox"},
    },
    "known": {"word_embedding": {"tokens": ["left", "fox"]}},
    "textual_inversion": {"new_token": {"tokens": ["<v1>", "<v1>_1"], "init": "fox"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_saved_and_read_again(
    name: str, sdxl: Any, sdxl_folder: Path, tmp_path: Path
) -> None:
    path = trained(sdxl, METHODS[name], tmp_path / "a.safetensors", sdxl_folder)
    wanted = drawn(sdxl.eval(), ["a <v1> fox", "a cat"])
    loaded, _ = load_adapted(path)
    assert torch.equal(drawn(loaded.eval(), ["a <v1> fox", "a cat"]), wanted)
    if "new_token" in METHODS[name]:
        for part, encoder in loaded.text_encoders.items():
            ids = loaded.tokenizers[part].convert_tokens_to_ids(["<v1>", "fox</w>"])
            rows = encoder.get_input_embeddings().weight[ids]
            assert float((rows[0] - rows[1]).abs().max()) > 1e-3, f"{part} has learned nothing"


# what no python library reads
WITHOUT_CALL = {("lora", "comfyui"), ("custom_diffusion", "comfyui"), ("known", "kohya")}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("lora", "diffusers"),
        ("lora", "kohya"),
        ("lora", "peft"),
        ("lora", "comfyui"),
        ("lora", "merged"),
        ("textual_inversion", "kohya"),
        ("known", "kohya"),
        ("known", "diffusers"),
        ("custom_diffusion", "custom_diffusion"),
        ("custom_diffusion", "merged"),
        ("custom_diffusion", "comfyui"),
    ],
)
def test_exports_are_proven(
    name: str, written: str, sdxl: Any, sdxl_folder: Path, tmp_path: Path
) -> None:
    path = trained(sdxl, METHODS[name], tmp_path / "a.safetensors", sdxl_folder)
    lines: list[str] = []
    out = export(path, tmp_path / "out", written, say=lines.append)
    assert any("largest difference" in line for line in lines)
    called = any("the call in README.md gives a picture" in line for line in lines)
    assert called == ((name, written) not in WITHOUT_CALL)
    if written == "merged":
        pictures = painted(_with(stock(out), sdxl))
        assert float((pictures - drawn(sdxl.eval())).abs().max()) <= CLOSE


def _with(pipe: Any, model: Any) -> Any:
    pipe.scheduler = model.scheduler()
    return pipe


@pytest.mark.parametrize("written", ["diffusers", "kohya"])
def test_a_stock_pipeline_paints_with_the_adapter(
    written: str, copy: Path, open_folder: Open, tmp_path: Path
) -> None:
    """LoRA of the network and of both text encoders, and a new word in both; also where the file of
    the second says, as that of 1.0, that the end of text is token 2."""
    if written == "kohya":
        edit(copy / "text_encoder_2" / "config.json", eos_token_id=2)
    sdxl_folder, sdxl = copy, load_backbone(backbone_spec(str(copy)), str(copy)).eval()
    tree = METHODS["lora"] | METHODS["textual_inversion"]
    path = trained(sdxl, tree, tmp_path / "a.safetensors", sdxl_folder)
    out = export(path, tmp_path / "out", written, say=lambda line: None)
    pipe = _with(stock(sdxl_folder), sdxl)
    (file,) = out.glob("*.safetensors")
    if written == "kohya":
        from safetensors import safe_open

        with safe_open(file, "pt") as tensors:
            starts = {"_".join(key.split("_")[:2]) for key in tensors.keys()}  # noqa: SIM118
        assert starts == {"lora_unet", "lora_te1", "lora_te2"}
    prompts = ["a <v1> fox", "a cat"]
    base = painted(pipe, ["a fox", "a cat"])
    names: dict[str, Any] = {"pipe": pipe, "folder": str(out)}
    exec("from safetensors.torch import load_file\n" + _loading(out), names)
    wanted = drawn(sdxl.eval(), prompts)
    assert float((painted(pipe, prompts) - wanted).abs().max()) <= CLOSE
    assert float((base - wanted).abs().max()) > 10 * CLOSE


def _loading(out: Path) -> str:
    """The lines of a README that load its files."""
    text = (out / "README.md").read_text()
    lines = text.partition("```python\n")[2].splitlines()
    return "\n".join(line for line in lines if line.startswith(("pipe.load", "rows", "pipe.text")))


@torch.no_grad()
def test_the_pooled_text_ends_where_the_prompt_does(copy: Path) -> None:
    """The checkpoint's file says token 2 is the end: transformers then pools at the largest id."""
    edit(copy / "text_encoder_2" / "config.json", eos_token_id=2)
    model = load_backbone(backbone_spec(str(copy)), str(copy)).eval()
    plain = model.encode_prompts(PROMPTS).pooled
    torch.testing.assert_close(plain, stock(copy).encode_prompt(PROMPTS)[2], rtol=0, atol=1e-6)
    apply_methods(model, methods_of(METHODS["textual_inversion"]))
    one, other = model.encode_prompts(["a <v1> fox", "a <v1> cat"]).pooled
    assert float((one - other).abs().max()) > 1e-4, "the words after <v1> are not read"
    assert model.pipeline().text_encoder_2.config.eos_token_id == model.tokenizer_2.eos_token_id


def test_every_trained_tensor_of_the_encoders_has_a_gradient(sdxl: Any) -> None:
    """That of CLIP's last layer, which nothing reads, is zero: several GPUs need one of each."""
    tree = {"lora": {"sites": "cross", "rank": 2, "text_encoder": ["q", "fc1"]}}
    plan = apply_methods(sdxl, methods_of(tree))
    task = Denoise(sdxl, Objective(sdxl.target, sdxl.alphas_cumprod))
    task.loss(task.encode(batch_of())).losses.mean().backward()
    named = dict(sdxl.named_parameters())
    assert all(named[name].grad is not None for name in plan.names)
    ups = [n for n in plan.names if n.startswith("text_encoder.") and "lora_B" in n]
    dead = {name for name in ups if not named[name].grad.any()}
    assert dead == {name for name in ups if ".layers.2." in name}


def test_the_memory_of_a_step_is_estimated(sdxl: Any) -> None:
    """The network is called with all that it is told, without values."""
    words = ["recipe=lora", "backbone=sdxl", "data.prior_weight=0", "run.resolution=32"]
    apply_methods(sdxl, methods_of(METHODS["lora"]))
    one, two = (step_bytes(load_recipe(words), sdxl, rows) for rows in (1, 2))
    assert 1.5 * one < two < 2.5 * one


def test_an_error_names_the_text_encoder(sdxl: Any) -> None:
    sdxl.tokenizer_2.add_tokens(["<v1>"])
    with pytest.raises(ValueError, match="text_encoder_2: token '<v1>' exists already"):
        apply_methods(sdxl, methods_of(METHODS["textual_inversion"]))


def test_gradient_checkpointing_changes_nothing(sdxl_folder: Path, open_folder: Open) -> None:
    found = []
    for again in (False, True):
        model = open_folder(sdxl_folder)
        plan = apply_methods(model, methods_of(METHODS["lora"]))
        if again:
            model.enable_gradient_checkpointing()
        task = Denoise(model, Objective(model.target, model.alphas_cumprod))
        task.loss(task.encode(batch_of())).losses.mean().backward()
        named = dict(model.named_parameters())
        found.append({name: named[name].grad for name in plan.names})
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-4, atol=1e-7)


def test_all_encoders_are_held_in_half_precision(sdxl: Any) -> None:
    place(sdxl.requires_grad_(False), Placement(torch.device("cpu"), "bf16"))
    for part in (sdxl.unet, *sdxl.text_encoders.values()):
        kinds = {m.weight.dtype for m in part.modules() if isinstance(m, torch.nn.Linear)}
        assert kinds == {torch.bfloat16}
    assert {value.dtype for value in sdxl.vae.parameters()} == {torch.float32}
    with torch.no_grad():
        output = sdxl.predict(noise(SEEDS, 8, 8, 8), torch.tensor([3, 9]),
                              sdxl.encode_prompts(PROMPTS))  # fmt: skip
    assert output.dtype == torch.float32 and bool(output.isfinite().all())


@torch.no_grad()
def test_long_prompts_are_read_in_parts_by_both(sdxl_folder: Path) -> None:
    spec = backbone_spec(str(sdxl_folder)).model_copy(update={"max_tokens": 60})
    model, plain = load_backbone(spec, "x").eval(), load_backbone(
        backbone_spec(str(sdxl_folder)), "x").eval()  # fmt: skip
    long = "a fox on a blue background " * 7
    ids = plain.tokenizer(long, add_special_tokens=False).input_ids
    first, second = (plain.tokenizer.decode(ids[n : n + 30]) for n in (0, 30))
    own, parts = model.encode_prompts([long]), plain.encode_prompts([first, second])
    assert own.tokens.shape == (1, 64, 80)
    torch.testing.assert_close(own.tokens, parts.tokens.flatten(0, 1)[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(own.pooled, parts.pooled[:1], rtol=0, atol=1e-5)


def test_check_reads_a_folder_without_torch(sdxl_folder: Path) -> None:
    code = (
        "import sys; from trainer.config.load import load_recipe\n"
        f"load_recipe(['recipe=lora', 'backbone={sdxl_folder}', 'data.prior_weight=0'])\n"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert printed.stdout.strip() == "set()"


def test_the_backbone_of_the_hub_is_pinned() -> None:
    spec = backbone_spec("sdxl")
    assert (spec.family, spec.hub) == ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    words = ["recipe=lora", "backbone=sdxl", "data.prior_weight=0"]
    assert load_recipe(words).backbone == spec


def _nothing(part: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", **{part: [None, None]})


def _file(path: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / path, **changes)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "inpainting": (_file("unet/config.json", in_channels=17), "takes 17 channels, a mask"),
    "refiner": (_nothing("text_encoder"), "names no text_encoder; .* as refiners, are not trained"),
    "second": (_nothing("text_encoder_2"), "names no text_encoder_2; this family reads prompts"),
    "folder": (
        lambda folder: shutil.rmtree(folder / "text_encoder_2"),
        r"text_encoder_2: config\.json is missing",
    ),
    "tokenizer": (
        lambda folder: shutil.rmtree(folder / "tokenizer_2"),
        r"tokenizer_2: tokenizer_config\.json is missing",
    ),
    "width": (
        _file("unet/config.json", cross_attention_dim=96),
        r"reads text of width 96, and its text encoders give 32 \+ 48",
    ),
    "aesthetic": (
        _file("unet/config.json", projection_class_embeddings_input_dim=64),
        "is told 64 values beside the text, .* are 72: it is a refiner",
    ),
    "plain": (_file("unet/config.json", addition_embed_type=None), "has addition_embed_type=None"),
    "latents": (
        _file("vae/config.json", latents_mean=[0.0] * 8),
        "vae has latents_mean: latents of",
    ),
    "edm": (
        _file("scheduler/scheduler_config.json", _class_name="EDMEulerScheduler"),
        "a EDMEulerScheduler, of a model that was trained on EDM's noise levels",
    ),
    "kind": (
        _file("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is a CLIPTextModel of transformers; this family has",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_load_is_refused(name: str, copy: Path) -> None:
    spoil, message = REFUSED[name]
    spoil(copy)
    with pytest.raises(RecipeError, match=message):
        backbone_spec(str(copy))


def test_a_condition_without_pooled_text_is_no_mistake_of_others(tiny: Any) -> None:
    """A crop is told to those alone who have an encoder for it."""
    assert "crop" not in tiny.encoders
    assert Condition(crop=torch.ones(1, 6)).tensors().keys() == {"crop"}
