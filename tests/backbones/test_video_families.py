"""The families of video, Wan, CogVideoX and LTX-Video, against stock diffusers: prompts, latents,
predictions, clips; what trains and is read back; what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from edited import edit
from flow_checks import check_folder_facts
from method_examples import EXAMPLES
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from two_steps import two_steps
from video_folders import make_video_folder

from trainer.attention.context import StepContext, use
from trainer.backbones import load_backbone, vae
from trainer.backbones.device import Placement, place
from trainer.backbones.families import family_of, find_family
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.data.loader import Batch
from trainer.diffusion.inversion import invert
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.export.import_ import import_file
from trainer.export.layer_names import original_names
from trainer.methods.apply import apply_methods, find_method, method_names
from trainer.runs.adapter import load_adapted
from trainer.training.fit import fit
from trainer.training.tasks.denoise import Denoise

FAMILIES = ("wan", "cogvideox", "ltx")
PROMPTS = ["a fox moving left", "a cat"]
SEEDS = [3, 4]
STEPS = 3
CLOSE = 2 / 255
FRAMES = {"wan": 5, "cogvideox": 9, "ltx": 9}  # the shortest clips, of 2, 3 and 2 latent frames
LATENTS = {"wan": 2, "cogvideox": 3, "ltx": 2}
SIDE = {"wan": 32, "cogvideox": 32, "ltx": 64}
CHANNELS = {"wan": 4, "cogvideox": 4, "ltx": 8}
Open = Callable[[Path], Any]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("video")

    def folder(family: str) -> Path:
        if not (place / family).is_dir():
            make_video_folder(family, place / family)
        return place / family

    return folder


@pytest.fixture(scope="module")
def open_folder() -> Open:
    """A fresh copy of a backbone, which is loaded once."""
    loaded: dict[Path, Any] = {}

    def opened(folder: Path) -> Any:
        if folder not in loaded:
            loaded[folder] = load_backbone(backbone_spec(str(folder)), str(folder)).eval()
        return copy.deepcopy(loaded[folder])

    return opened


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(family: str, folders: Callable[[str], Path]) -> Path:
    return folders(family)


@pytest.fixture
def model(folder: Path, open_folder: Open) -> Any:
    """A fresh backbone that a test may edit."""
    return open_folder(folder)


def stock(folder: Path) -> Any:
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe: Any = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise(family: str, clips: int = 2, frames: int | None = None) -> Tensor:
    """Latents (clips f, c, h, w) as `sample` draws them from the seeds."""
    side = SIDE[family] // (32 if family == "ltx" else 8)
    shape = (frames or LATENTS[family], CHANNELS[family], side, side)
    each = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in SEEDS[:clips]]
    return torch.cat(each)


def as_stock(family: str, rows: Tensor, frames: int | None = None) -> Tensor:
    """Rows of latents as the stock pipeline takes them."""
    clips = rows.unflatten(0, (-1, frames or LATENTS[family]))  # b f c h w
    if family == "cogvideox":
        return clips
    clips = clips.transpose(1, 2)
    return clips.flatten(2).transpose(1, 2) if family == "ltx" else clips


def filmed(pipe: Any, family: str, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    """What a stock pipeline makes from the noise of the seeds, (b f, 3, H, W) in [0, 1]."""
    own: dict[str, Any] = {
        "num_inference_steps": STEPS, "guidance_scale": 4.0, "height": SIDE[family],
        "width": SIDE[family], "num_frames": FRAMES[family], "output_type": "pt",
    }  # fmt: skip
    if family == "cogvideox":
        own["max_sequence_length"] = 24
    frames = (options.get("num_frames", FRAMES[family]) - 1) // (FRAMES[family] - 1)
    latents = noise(family, len(prompts), frames=None if frames else 1)
    latents = as_stock(family, latents, frames=None if frames else 1)
    found: Tensor = pipe(prompts, latents=latents, **(own | options)).frames
    return found.flatten(0, 1)


def drawn(model: Any, family: str, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    side = SIDE[family]
    options = {"frames": FRAMES[family], "guidance": 4.0} | options
    how = Sampling(STEPS, size=(side, side), **options)
    return sample(model, prompts, SEEDS[: len(prompts)], settings=how) / 2 + 0.5


def pixels_of(family: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * FRAMES[family], 3, SIDE[family], SIDE[family])
    return torch.rand(shape, generator=generator) * 2 - 1


def test_a_folder_says_its_family(family: str, model: Any, folder: Path) -> None:
    assert family_of(folder) == model.family == family
    assert model.layout == "tokens" and model.text_width == 16
    assert model.latent_channels == CHANNELS[family]
    assert model.text_length == {"wan": 512, "cogvideox": 24, "ltx": 128}[family]
    assert model.divisor == (32 if family == "ltx" else 8)
    assert model.multiple == (32 if family == "ltx" else 16)
    check_folder_facts(model, folder)
    kinds = {site.kind for site in model.sites}
    assert kinds == ({"joint"} if family == "cogvideox" else {"self", "cross"})
    assert all(site.keeps_processor or site.kind for site in model.sites)


@torch.no_grad()
def test_what_the_families_declare_is_there(family: str, model: Any) -> None:
    traits, seen = model.declared.traits, []
    network = model.denoiser
    network.get_submodule(traits.time_embedding).register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    ctx = StepContext(0, 1, torch.tensor(300.0), frames=LATENTS[family])
    text = model.encode_prompts(PROMPTS).per_frame(LATENTS[family])
    with use(ctx):
        model.predict(noise(family), torch.full((2 * LATENTS[family],), 300.0), text)
    width = network.get_submodule(traits.time_width).out_features
    assert [tuple(shape) for shape in seen] == [(2, width)]
    assert [type(block).__name__ for block in model.blocks()] == [
        type(model.blocks()[0]).__name__
    ] * 2
    if traits.input:
        assert network.get_submodule(traits.input).in_channels == CHANNELS[family]


@torch.no_grad()
def test_prompts_are_those_of_the_stock_pipeline(family: str, model: Any, folder: Path) -> None:
    own = model.encode_prompts([*PROMPTS, "", ""])
    length = {"max_sequence_length": model.text_length}
    found = stock(folder).encode_prompt(PROMPTS, negative_prompt=["", ""], **length)
    texts = (found[0], found[2]) if family == "ltx" else found
    torch.testing.assert_close(own.tokens, torch.cat(texts), rtol=0, atol=1e-6)
    if family == "ltx":
        assert torch.equal(own.mask.bool(), torch.cat([found[1], found[3]]))
    else:
        assert own.mask is None


@torch.no_grad()
def test_latents_are_those_of_the_vae(family: str, model: Any, folder: Path) -> None:
    vae, pixels = stock(folder).vae, pixels_of(family)
    clips = pixels.unflatten(0, (2, -1)).transpose(1, 2)
    mean = vae.encode(clips).latent_dist.mean
    moments = model.moments(pixels, FRAMES[family])
    own = model.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
    shape = (1, -1, 1, 1, 1)
    if family == "wan":
        wanted = mean - torch.tensor(vae.config.latents_mean).view(shape)
        wanted = wanted / torch.tensor(vae.config.latents_std).view(shape)
    elif family == "ltx":
        wanted = (mean - vae.latents_mean.view(shape)) / vae.latents_std.view(shape)
    else:
        wanted = mean * 0.7
    assert len(own) == 2 * LATENTS[family]
    torch.testing.assert_close(own, wanted.transpose(1, 2).flatten(0, 1), rtol=0, atol=1e-5)
    shown = vae.decode(mean).sample.transpose(1, 2).flatten(0, 1).clamp(-1, 1)
    torch.testing.assert_close(model.decode(own, LATENTS[family]), shown, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_prediction_is_the_call_of_the_stock_network(
    family: str, model: Any, folder: Path
) -> None:
    network, x_t, frames = stock(folder).transformer, noise(family), LATENTS[family]
    text, t = model.encode_prompts(PROMPTS), torch.tensor([3.0, 700.0])
    fps = torch.tensor([10.0, 30.0])
    given: dict[str, Any] = {"timestep": t, "encoder_hidden_states": text.tokens}
    if family == "ltx":
        seconds = (8 / fps).view(2, 1, 1, 1, 1)
        given |= {"encoder_attention_mask": text.mask, "num_frames": 2, "height": 2, "width": 2}
        given["rope_interpolation_scale"] = (seconds, 32, 32)
    wanted = network(as_stock(family, x_t), **given).sample
    if family == "cogvideox":
        wanted = wanted.flatten(0, 1)
    elif family == "ltx":
        wanted = wanted.unflatten(1, (2, 2, 2)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    else:
        wanted = wanted.transpose(1, 2).flatten(0, 1)
    with use(StepContext(0, 1, t, frames=frames, fps=fps)):
        own = model.predict(x_t, t.repeat_interleave(frames), text.per_frame(frames))
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
    assert float(wanted.std()) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_clips_are_those_of_the_stock_pipeline(
    guidance: float, family: str, model: Any, folder: Path
) -> None:
    pipe = stock(folder)
    pipe.scheduler = model.scheduler()
    wanted = filmed(pipe, family, guidance_scale=guidance)
    own = drawn(model, family, guidance=guidance)
    assert own.shape == (2 * FRAMES[family], 3, SIDE[family], SIDE[family])
    assert float((own - wanted).abs().max()) <= CLOSE
    assert float(wanted.std()) > 0.02


def test_a_picture_is_a_clip_of_one_frame(family: str, model: Any, folder: Path) -> None:
    pipe = stock(folder)
    pipe.scheduler = model.scheduler()
    wanted = filmed(pipe, family, num_frames=1)
    assert float((drawn(model, family, frames=1) - wanted).abs().max()) <= CLOSE


def test_larger_cogvideox_models_have_rotary_positions(open_folder: Open, tmp_path: Path) -> None:
    """As CogVideoX-5b, at another size than its own, and with its other scheduler's file."""
    network = {"use_rotary_positional_embeddings": True, "sample_width": 6}
    folder = make_video_folder("cogvideox", tmp_path / "rotary", **network)
    edit(folder / SCHEDULER, _class_name="CogVideoXDPMScheduler")
    model, pipe = open_folder(folder), stock(folder)
    assert type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler"  # as the index names it
    pipe.scheduler = model.scheduler()
    own = drawn(model, "cogvideox")
    assert float((own - filmed(pipe, "cogvideox")).abs().max()) <= CLOSE
    model.denoiser.register_to_config(use_rotary_positional_embeddings=False)
    assert float((own - drawn(model, "cogvideox")).abs().max()) > 1e-3


def test_the_rate_is_told_to_ltx_alone(folders: Any, open_folder: Open) -> None:
    for family in ("ltx", "wan"):
        model = open_folder(folders(family))
        slow, fast = (drawn(model, family, PROMPTS[:1], fps=fps) for fps in (4.0, 30.0))
        assert (float((slow - fast).abs().max()) > 1e-4) == (family == "ltx")
    pipe = stock(folders("ltx"))
    wanted = filmed(pipe, "ltx", PROMPTS[:1], frame_rate=30)
    own = drawn(open_folder(folders("ltx")), "ltx", PROMPTS[:1], fps=30.0)
    assert float((own - wanted).abs().max()) <= CLOSE


@pytest.mark.parametrize(("frames", "near"), [(2, "1 or 5"), (8, "5 or 9"), (10, "9 or 13")])
def test_frames_that_do_not_fit_are_refused(
    frames: int, near: str, folders: Any, open_folder: Open
) -> None:
    model = open_folder(folders("wan"))
    text = f"frames={frames}: this backbone takes clips of a multiple of 4 frames and one more; "
    with pytest.raises(ValueError, match=f"{text}give {near}"):
        drawn(model, "wan", frames=frames)
    with pytest.raises(ValueError, match=f"give {near}"):
        model.moments(torch.zeros(frames, 3, 32, 32), frames)
    words = ["recipe=lora", f"backbone={folders('wan')}", "data.source=world_clips"]
    with pytest.raises(RecipeError, match=f"data.frames={frames}: .*give {near}"):
        load_recipe([*words, f"data.frames={frames}", "preview.maps=null", "run.resolution=32"])


def test_cogvideox_takes_every_eighth_frame(folders: Any, open_folder: Open) -> None:
    """Its decoder makes 8 frames of 2 latent frames, so that 5 would come back as 8."""
    model = open_folder(folders("cogvideox"))
    with pytest.raises(ValueError, match=r"frames=5: .* a multiple of 8 .* give 1 or 9"):
        drawn(model, "cogvideox", frames=5)
    assert stock(folders("cogvideox")).vae.decode(torch.zeros(1, 4, 2, 2, 2)).sample.shape[2] == 8


def batch_of(family: str, step: int = 0) -> Batch:
    return Batch(
        step, [0, 1], PROMPTS, ["a", "b"], torch.ones(2), pixels=pixels_of(family, step),
        frames=FRAMES[family], fps=[8.0, 12.0],
    )  # fmt: skip


@torch.no_grad()
def test_the_loss_is_that_of_its_path(family: str, model: Any) -> None:
    """x_t and the target by formula, one timestep and one noise for the frames of a clip."""
    objective = Objective(model.target, model.alphas_cumprod)
    task, batch = Denoise(model, objective), batch_of(family)
    state = task.encode(batch)
    assert state.x0.shape[0] == 2 * LATENTS[family] and state.t.shape == (2,)
    t = state.t.repeat_interleave(LATENTS[family]).view(-1, 1, 1, 1)
    if family == "cogvideox":
        assert model.target == "v"
        squared = model.scheduler().alphas_cumprod[t.long()]
        alpha, sigma = squared.sqrt().float(), (1 - squared).sqrt().float()
        wanted = alpha * state.noise - sigma * state.x0
    else:
        assert model.target == "flow"
        alpha, sigma = 1 - t / 1000, t / 1000
        wanted = state.noise - state.x0
    torch.testing.assert_close(state.x_t, alpha * state.x0 + sigma * state.noise)
    result = task.loss(state)
    error = (result.output - wanted).square().unflatten(0, (2, -1)).mean((1, 2, 3, 4))
    torch.testing.assert_close(result.losses, error)
    assert float(task.score(batch, [0.5]).min()) > 0


@torch.no_grad()
def test_inversion_goes_back_to_the_clip(folders: Any, open_folder: Open) -> None:
    model = open_folder(folders("wan"))
    latents = noise("wan", clips=1) / 2
    start = invert(model, latents, ["a fox"], steps=4, frames=5, iterations=20)
    how = Sampling(4, guidance=1.0, size=(32, 32), frames=5)
    found = sample(model, ["a fox"], [0], settings=how, start=start)
    torch.testing.assert_close(found, model.decode(latents, 2), rtol=0, atol=2e-3)


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"sites": "all", "rank": 2}},
    "selective": {"selective": {"sites": "cross", "projections": ["k", "v"]}},
}


def trained(model: Any, family: str, path: Path, folder: Path, tree: dict[str, Any]) -> Path:
    """The adapter of methods that take two steps on random clips."""
    batches, run = partial(batch_of, family), {"resolution": SIDE[family]}
    return two_steps(model, tree, path, folder=folder, batch_of=batches, lr=5e-2, run=run)


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_saved_and_read_again(
    name: str, family: str, model: Any, folder: Path, tmp_path: Path
) -> None:
    tree = METHODS[name]
    if (name, family) == ("selective", "cogvideox"):
        with pytest.raises(ValueError, match=r"matches no attention site; .* the kinds joint"):
            apply_methods(model, methods_of(tree))
        tree = {name: tree[name] | {"sites": None}}  # the text of layers that read both
    base = drawn(model, family, PROMPTS[:1])
    path = trained(model, family, tmp_path / "a.safetensors", folder, tree)
    wanted = drawn(model.eval(), family, PROMPTS[:1])
    assert float((wanted - base).abs().max()) > 1e-3
    loaded, _ = load_adapted(path)
    assert torch.equal(drawn(loaded.eval(), family, PROMPTS[:1]), wanted)


@pytest.mark.sampled(1, each=["written"])
@pytest.mark.parametrize("written", ["diffusers", "peft"])
def test_a_stock_pipeline_films_with_the_adapter(
    written: str, family: str, model: Any, folder: Path, tmp_path: Path
) -> None:
    path = trained(model, family, tmp_path / "a.safetensors", folder, METHODS["lora"])
    lines: list[str] = []
    out = export(path, tmp_path / "out", written, say=lines.append)
    assert any("largest difference" in line for line in lines)
    if written == "peft":
        return
    assert any("the call in README.md gives a picture" in line for line in lines)
    pipe = stock(folder)
    pipe.scheduler = model.scheduler()
    base = filmed(pipe, family)
    pipe.load_lora_weights(out)
    found = filmed(pipe, family)
    assert float((found - drawn(model.eval(), family)).abs().max()) <= CLOSE
    assert float((found - base).abs().max()) > CLOSE


def test_a_run_on_clips_of_the_world(
    family: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe path: latents in the cache, previews of clips, images among the clips, loss on
    held-out clips; without the cache it trains the same."""
    monkeypatch.chdir(tmp_path)
    side, frames = SIDE[family], FRAMES[family]
    words = [
        "recipe=lora", f"backbone={folder}", "methods.new_token=null", "data.source=world_clips",
        "data.count=3", f"data.frames={frames}", "data.images=0.4", "data.validation=1",
        f"run.resolution={side}", "run.steps=3", "run.batch_size=2", "run.validate_every=3",
        "preview.every=3", "preview.steps=2", "preview.prompts=[a fox]", "preview.maps=null",
        "tracker=none", "optim.lr=1e-2", "optim.warmup=0", "run.checkpoint_every=0",
        "methods.lora.rank=4",
    ]  # fmt: skip
    made = fit(load_recipe(words), tmp_path / "run")
    with safe_open(made / "adapter.safetensors", "pt") as file:
        moved = {key: float(file.get_tensor(key).abs().max()) for key in file.keys()}  # noqa: SIM118
    assert all(value > 0 for key, value in moved.items() if ".lora_B." in key)
    (film,) = (made / "previews").glob("step-000003/*.gif")
    with Image.open(film) as clip:
        assert (clip.n_frames, clip.size) == (frames, (side, side))  # type: ignore[attr-defined]
    if family != "wan":
        return
    again = fit(load_recipe([*words, "run.cache_latents=false"]), tmp_path / "again")
    with safe_open(again / "adapter.safetensors", "pt") as file:
        other = {key: float(file.get_tensor(key).abs().max()) for key in file.keys()}  # noqa: SIM118
    assert other == pytest.approx(moved, rel=1e-3)


def test_attention_maps_of_clips_are_refused(folders: Any) -> None:
    words = ["recipe=lora", f"backbone={folders('wan')}", "methods.new_token=null"]
    words += ["data.source=world_clips", "preview.prompts=[a fox]", "preview.maps=fox"]
    words += ["run.resolution=32"]
    with pytest.raises(RecipeError, match=r"preview.maps=fox: .* give preview.maps=null"):
        load_recipe([*words, "data.frames=5"])
    assert load_recipe([*words, "data.frames=1"]).preview.maps == "fox"


@torch.no_grad()
def test_half_precision_is_close(family: str, model: Any) -> None:
    """The VAE stays in fp32."""
    x_t, frames = noise(family), LATENTS[family]
    ctx = StepContext(0, 1, torch.tensor(300.0), frames=frames)
    text = model.encode_prompts(PROMPTS).per_frame(frames)
    with use(ctx):
        wanted = model.predict(x_t, ctx.timestep.expand(len(x_t)), text)
    place(model.requires_grad_(False), Placement(torch.device("cpu"), "bf16"))
    with use(ctx):
        found = model.predict(x_t, ctx.timestep.expand(len(x_t)), text)
    assert found.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < 0.05
    assert {value.dtype for value in model.vae.parameters()} == {torch.float32}


@torch.no_grad()
def test_large_clips_are_computed_in_tiles(folders: Any, open_folder: Open) -> None:
    """Those of which a few frames have more pixels than `TILED_CLIP`; others whole, as many at a
    time as fit."""
    model, seen = open_folder(folders("wan")), []
    encode, limits = model.vae.encode, pytest.MonkeyPatch()

    def encoded(clips: Tensor) -> Any:
        seen.append((len(clips), model.vae.use_tiling))
        return encode(clips)

    model.vae.encode = encoded
    pixels = pixels_of("wan")
    with limits.context() as patch:
        patch.setattr(vae, "TILED_CLIP", 5 * 32 * 32)
        whole = model.moments(pixels, 5)
        patch.setattr(vae, "TILED_CLIP", 5 * 32 * 32 - 1)
        patch.setattr(vae, "SLICE", 32 * 32)
        model.moments(pixels, 5)
    assert seen == [(2, False), (1, True), (1, True)]
    alone = torch.cat([model.moments(clip, 5) for clip in pixels.split(5)])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_decoder_that_removes_noise_is_told_of_none() -> None:
    """As LTX-Video 0.9.5, with the default of the stock pipeline."""
    levels, layers = (8, 8, 8, 8), (1, 1, 1, 1, 1)
    torch.manual_seed(0)
    own: Any = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=levels, decoder_block_out_channels=levels,
        layers_per_block=layers, decoder_layers_per_block=layers, timestep_conditioning=True,
    ).eval()  # fmt: skip
    rows = torch.randn(4, 8, 2, 2)
    found = vae.decoded(own, rows, find_family("ltx").latents, frames=2)
    clips = rows.unflatten(0, (2, 2)).transpose(1, 2)
    for level, near in ((0.0, True), (0.5, False)):
        wanted = own.decode(clips, torch.full((2,), level)).sample.transpose(1, 2).flatten(0, 1)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5) == near


INFLATING = [name for name in method_names() if find_method(name).inflates]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", INFLATING)
def test_what_makes_clips_of_pictures_is_refused(
    method: str, folders: Any, open_folder: Open
) -> None:
    """By its name and that of the network."""
    assert {"animatediff", "tune_a_video", "text2video_zero", "pix2video", "vdm"} <= set(INFLATING)
    for family, network in (("wan", "Wan"), ("cogvideox", "CogVideoX"), ("ltx", "LTXVideo")):
        model = open_folder(folders(family))
        text = f"methods.{method}: it needs every frame of a clip as a row of the batch, and "
        why = f"{text}{network}.*Transformer3DModel has frames as tokens"
        with pytest.raises(ValueError, match=f"{why}, so it is a model of clips; choose a back"):
            apply_methods(model, {method: find_method(method)(**EXAMPLES[method])})


def test_guidance_between_frames_is_refused(folders: Any, open_folder: Open) -> None:
    model = open_folder(folders("wan"))
    with pytest.raises(ValueError, match=r"temporal_guidance=2 .* hold several frames"):
        drawn(model, "wan", temporal_guidance=2.0)


NETWORK, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"
REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "two_stages": ("wan", "model_index.json", {"boundary_ratio": 0.9},
                   r"transformer_2 takes over at low noise, as in Wan 2\.2"),
    "timesteps": ("wan", "model_index.json", {"expand_timesteps": True},
                  "transformer has a timestep for each token"),
    "of_image": ("wan", NETWORK, {"in_channels": 36}, "transformer takes 36 channels"),
    "text": ("wan", NETWORK, {"text_dim": 24}, "reads text of width 24, and its text_encoder"),
    "encoder": ("wan", "model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]},
                "text_encoder is a T5EncoderModel of transformers; this family has UMT5"),
    "vp": ("wan", SCHEDULER, {"prediction_type": "epsilon", "use_flow_sigmas": False},
           "scheduler is a UniPCMultistepScheduler of prediction_type=epsilon"),
    "vae": ("wan", "vae/config.json", {"_class_name": "AutoencoderKL"}, "vae is a AutoencoderKL"),
    "newer": ("cogvideox", NETWORK, {"patch_size_t": 2}, r"as CogVideoX 1\.5, which is not"),
    "ddim": ("cogvideox", SCHEDULER, {"_class_name": "DDIMScheduler"},
             "scheduler is a DDIMScheduler; this family has CogVideoXDDIMScheduler and"),
    "prediction": ("cogvideox", SCHEDULER, {"prediction_type": "other"}, "prediction_type is 'oth"),
    "patches": ("ltx", NETWORK, {"patch_size": 2}, "transformer has tokens of several latents"),
    "noise": ("ltx", "vae/config.json", {"decoder_inject_noise": [True]}, "vae draws noise while"),
    "other": ("ltx", "model_index.json", {"_class_name": "WanPipeline"},
              "transformer|vae|text_encoder"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_load_is_refused(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    family, file, changes, message = REFUSED[name]
    spoilt = Path(shutil.copytree(folders(family), tmp_path / "copy"))
    edit(spoilt / file, **changes)
    with pytest.raises(RecipeError, match=message):
        backbone_spec(str(spoilt))


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "transformer"])
def test_a_missing_part_is_named(part: str, folders: Any, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(folders("wan"), tmp_path / "copy"))
    shutil.rmtree(spoilt / part)
    with pytest.raises(RecipeError, match=f"{part}: .*config.json is missing"):
        backbone_spec(str(spoilt))


def test_other_solvers_do_not_know_the_levels_of_cogvideox(folders: Any, open_folder: Open) -> None:
    model = open_folder(folders("cogvideox"))
    with pytest.raises(ValueError, match=r"euler: .* noise levels of its own"):
        drawn(model, "cogvideox", sampler="euler")
    plain, named = (drawn(model, "cogvideox", sampler=name) for name in (None, "ddim"))
    assert torch.equal(plain, named)


@pytest.mark.parametrize("name", ["wan21_t2v_1_3b", "cogvideox_2b", "ltx_video"])
def test_backbones_of_the_hub_are_pinned(name: str) -> None:
    spec = backbone_spec(name)
    assert spec.hub is not None and len(spec.revision or "") == 40
    words = ["recipe=lora", f"backbone={name}", "methods.new_token=null", "preview.prompts=[a fox]"]
    words += ["preview.maps=null", "data.source=world_clips", "data.frames=9"]
    assert load_recipe(words).backbone == spec


def test_a_lora_under_the_names_of_wan_itself_is_read(
    folders: Any, open_folder: Open, tmp_path: Path
) -> None:
    """As ComfyUI and other trainers write it: our model and the stock pipeline become the same."""
    names = [
        "blocks.0.self_attn.q", "blocks.0.self_attn.o", "blocks.1.self_attn.v",
        "blocks.1.cross_attn.k", "blocks.1.cross_attn.o", "blocks.0.ffn.0", "blocks.1.ffn.2",
        "time_projection.1", "head.head",
    ]  # fmt: skip
    model, folder = open_folder(folders("wan")), folders("wan")
    table = original_names(model.denoiser)
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name in names:
        (layer,) = table[name]
        rows, columns = model.denoiser.get_submodule(layer).weight.shape
        for kind, shape in (("A", (2, columns)), ("B", (rows, 2))):
            value = 0.3 * torch.randn(shape, generator=generator)
            tensors[f"diffusion_model.{name}.lora_{kind}.weight"] = value
    save_file(tensors, tmp_path / "a.safetensors")
    pipe = stock(folder)
    pipe.scheduler = model.scheduler()
    pipe.load_lora_weights(tmp_path / "a.safetensors")
    out = tmp_path / "read.safetensors"
    import_file(tmp_path / "a.safetensors", str(folder), out, say=lambda line: None)
    loaded, _ = load_adapted(out)
    own = drawn(loaded.eval(), "wan")
    assert float((own - filmed(pipe, "wan")).abs().max()) <= CLOSE
    assert float((own - drawn(model, "wan")).abs().max()) > 1e-2
