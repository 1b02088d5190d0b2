"""Plans without a weight: the same as of a loaded backbone; of published checkpoints from their
configuration alone, with the numbers of parameters that they have; how much memory they take."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pixart_folder import SIGMA, make_pixart_folder
from sdxl_folder import make_sdxl_folder

from trainer.backbones.device import CPU, Placement, choose_placement
from trainer.backbones.pipeline_folder import without_values
from trainer.backbones.small_files import layout_of
from trainer.backbones.spec import BackboneSpec
from trainer.cli import check
from trainer.common.main_memory import free_memory
from trainer.config.lineage import backbone_names, read_backbone
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe, RecipeError
from trainer.data.tars.write_shards import write_world
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_base, save_adapter
from trainer.runs.run_folder import recipe_header
from trainer.training import without_weights
from trainer.training.adapt_backbone import adapt
from trainer.training.memory_estimate import Memory, memory_lines, memory_of
from trainer.training.plan_report import describe_plan, size
from trainer.training.without_weights import planned, refuse_unfit

WORDS = ["recipe=lora", "data.concept=sprite:penguin", "data.prior_weight=0", "run.batch_size=2"]
# values of each part: of the U-Nets and CLIPs as is well known of these checkpoints; of PixArt and
# Sana as their papers round them, 0.6 B, 0.6 B and 1.6 B; T5 XXL's encoder 4.8 B, Gemma 2 2.6 B;
# of SD 3 what is left of the published sums without their tables of positions
COUNTS: dict[str, dict[str, int]] = {
    "sd15": {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863},
    "sd21": {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863},
    "sdxl": {
        "unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
    "pixart_alpha": {
        "transformer": 611_349_152, "text_encoder": 4_762_310_656, "vae": 83_653_863
    },
    "pixart_sigma": {
        "transformer": 610_856_096, "text_encoder": 4_762_310_656, "vae": 83_653_863
    },
    "sana_600m": {
        "transformer": 591_747_872, "text_encoder": 2_614_341_888, "vae": 312_250_275
    },
    "sana_1600m": {
        "transformer": 1_604_462_752, "text_encoder": 2_614_341_888, "vae": 312_250_275
    },
    **{
        name: {
            "transformer": count, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840,
            "text_encoder_3": 4_762_310_656, "vae": 83_819_683,
        }
        for name, count in (
            ("sd3", 2_028_328_000), ("sd35_medium", 2_243_171_520), ("sd35_large", 8_056_627_520)
        )
    },
    "dit_xl": {"transformer": 749_826_464, "vae": 83_653_863},
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("planned")
    return {
        "sd": tiny_folder,
        "sdxl": make_sdxl_folder(root / "sdxl"),
        "pixart": make_pixart_folder(root / "pixart", SIGMA),  # whose T5 has one table twice
    }


def recipe_of(backbone: Any, *words: str) -> Recipe:
    return load_recipe([*WORDS, f"backbone={backbone}", *words])


@pytest.mark.parametrize(
    ("name", "precision"), [("sd", "fp32"), ("sdxl", "bf16"), ("pixart", "bf16")]
)
def test_a_plan_is_that_of_the_loaded_backbone(
    name: str, precision: str, folders: dict[str, Path]
) -> None:
    recipe = recipe_of(folders[name], f"run.precision={precision}", "run.resolution=32")
    placement = Placement(torch.device("cpu"), precision)
    loaded = load_base(recipe.backbone, recipe.backbone_name, placement, hold=False)
    wanted = adapt(recipe, loaded, placement)
    backbone, plan = planned(recipe, placement)
    read, unread = dict(loaded.named_parameters()), dict(backbone.named_parameters())
    assert {key: (value.shape, value.dtype) for key, value in read.items()} == {
        key: (value.shape, value.dtype) for key, value in unread.items()
    }
    assert (plan.trained, plan.total, plan.stored) == (wanted.trained, wanted.total, wanted.stored)
    own, other = memory_of(recipe, backbone, plan), memory_of(recipe, loaded, wanted)
    assert own == other
    tables = sum(value.nbytes for value in loaded.buffers())
    assert own.loading == 4 * sum(value.numel() for value in read.values()) + tables
    assert describe_plan(recipe, backbone, plan, 0) == describe_plan(recipe, loaded, wanted, 0)


def held_in_memory(model: Any, frozen: bool) -> int:
    """Bytes of the storages of what trains, or does not."""
    chosen = [value for value in model.parameters() if value.requires_grad != frozen]
    return sum(value.untyped_storage().nbytes() for value in chosen)


@pytest.mark.parametrize("name", COUNTS)
def test_published_checkpoints_are_counted_from_their_layouts(name: str) -> None:
    recipe = recipe_of(name)
    assert recipe.backbone.hub is not None and layout_of(recipe.backbone.hub) is not None
    with without_values():
        backbone = load_base(recipe.backbone, name, hold=False)
    parts = {backbone.denoiser_name: backbone.denoiser, **backbone.text_encoders}
    parts["vae"] = backbone.vae
    found = {part: sum(p.numel() for p in model.parameters()) for part, model in parts.items()}
    assert found == COUNTS[name]
    assert held_in_memory(backbone, frozen=True) < 100_000, "a weight was made"
    assert backbone.resolution == {"sd15": 512, "sd21": 768, "dit_xl": 256}.get(name, 1024)


@pytest.mark.parametrize("name", COUNTS)
def test_a_header_says_what_loading_takes(name: str) -> None:
    from trainer.common.declared import header_of
    from trainer.common.paths import BACKBONES

    text = " ".join(header_of(BACKBONES / f"{name}.yaml"))
    gigabytes = 4 * sum(COUNTS[name].values()) / 1e9
    assert f"{gigabytes:.1f} GB of memory to load" in text


def test_every_layout_is_of_a_backbone() -> None:
    for name in COUNTS:
        assert str(layout_of(read_backbone(name)["hub"])).endswith(f"/{name}")
    assert COUNTS.keys() <= set(backbone_names())


def test_check_plans_a_backbone_that_is_not_here(capsys: Any) -> None:
    words = [*WORDS, "backbone=sd15", "methods.lora={sites: cross, projections: [k, v], rank: 4}"]
    assert check.run([*words, "plan=true"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # K and V of 16 layers, of 768 words' features: 4 x (768 + width) each, at these widths; and
    # the row of the new word
    widths = 5 * [320] + 5 * [640] + 6 * [1280]
    trained = sum(2 * 4 * (768 + width) for width in widths) + 768
    assert f"trains {trained:,} of {859_520_964 + 123_060_480 + 83_653_863 + trained:,}" in said
    assert "adapter: 65 tensors, as text_encoder.embeddings.token_embedding.rows.0" in said
    assert "memory: unet 3.4 GB, text_encoder 492.2 MB, vae 334.6 MB, gradients and" in said
    assert "loading takes 4.3 GB of main memory" in said


def test_tables_of_positions_are_counted() -> None:
    """That of SD 3.5 medium is 384 x 384 places of 1,536 numbers."""
    recipe = recipe_of("sd35_medium", "run.resolution=256")
    backbone, plan = planned(recipe, Placement(torch.device("cpu"), "bf16"))
    memory = memory_of(recipe, backbone, plan)
    table, own = 384 * 384 * 1536 * 4, COUNTS["sd35_medium"]["transformer"]
    assert 2 * own + table < memory.parts["transformer"] < 2 * own + table + 100_000_000


def test_check_says_that_weights_are_not_here(capsys: Any, tiny_folder: Path) -> None:
    fits = "methods={lora: {sites: self}, new_token: null}"
    assert check.run([*WORDS, "backbone=dit_xl", fits, "data.token=sks"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the weights of facebook/DiT-XL-2-256 are not on this machine yet; plan=true" in said
    assert check.run([*WORDS, f"backbone={tiny_folder}"]) == 0
    assert "not on this machine" not in capsys.readouterr().out


def test_methods_that_do_not_fit_are_refused_before_a_download() -> None:
    nothing = "methods={lora: {sites: null, layers: ['*no_such*']}, new_token: null}"
    with pytest.raises(ValueError, match=r"methods\.lora: layers: '\*no_such\*' matches no"):
        refuse_unfit(recipe_of("dit_xl", nothing, "data.token=sks"))
    fits = "methods={lora: {sites: self}, new_token: null}"
    assert refuse_unfit(recipe_of("dit_xl", fits, "data.token=sks")) is None


@pytest.fixture
def unknown() -> BackboneSpec:
    return BackboneSpec(family="sd", hub="nobody/nothing", revision="0" * 40)


def with_backbone(recipe: Recipe, spec: BackboneSpec) -> Recipe:
    return replace(recipe, backbone=spec)


def test_a_configuration_that_is_not_here_is_asked_for(unknown: BackboneSpec) -> None:
    recipe = with_backbone(recipe_of("sd15"), unknown)
    said = r"configuration of nobody/nothing, a few small files, is not .* hf download nobody/n"
    with pytest.raises(ValueError, match=rf"{said}othing --revision 0+ --include 'model_index"):
        planned(recipe, CPU)
    assert refuse_unfit(recipe) == "backbone sd15 is on the hub"


def test_a_method_that_reads_weights_is_named(
    unknown: BackboneSpec, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    def reads(recipe: Recipe, backbone: Any, placement: Placement) -> Any:
        if backbone.vae.decoder.conv_in.weight.untyped_storage().nbytes() == 4:
            error = RuntimeError("more than one element refers to a single memory location")
            error.add_note("methods.lora")
            raise error
        return adapt(recipe, backbone, placement)

    monkeypatch.setattr(without_weights, "adapt", reads)
    with pytest.raises(ValueError, match=r"methods\.lora: it reads the base's weights, which"):
        planned(recipe_of("dit_xl", "methods={lora: {}}", "data.token=sks"), CPU)
    backbone, _ = planned(recipe_of(tiny_folder), CPU)  # whose weights are here, and are read
    assert backbone.vae.decoder.conv_in.weight.std() > 0


def test_a_folder_without_vocabulary_is_planned_but_not_taken(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """The stand-in has as many tokens as the text encoder, and no word in it."""
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    recipe = recipe_of(copy)
    whole = planned(recipe, CPU)[1]
    for file in (copy / "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    again = planned(recipe, CPU)[1]
    assert (again.stored, again.trained, again.total) == (whole.stored, whole.trained, whole.total)
    with pytest.raises(RecipeError, match=r"tokenizer: it has no vocabulary, one of tokenizer\.js"):
        recipe_of(copy)
    with pytest.raises(ValueError, match="it has no vocabulary"):
        load_base(recipe.backbone, "copy")


def test_what_weights_are_stored_in_is_planned_with(folders: dict[str, Path]) -> None:
    """Where they are not here, the backbone's file says it; where they are, they do."""
    spec = recipe_of("dit_xl").backbone
    with without_values():
        half = spec.model_copy(update={"stored": "bfloat16"})
        assert load_base(half, "mine", hold=False).published == torch.bfloat16
        assert load_base(spec, "mine", hold=False).published == torch.float32
        own = recipe_of(folders["sd"]).backbone.model_copy(update={"stored": "bfloat16"})
        assert load_base(own, "mine", hold=False).published == torch.float32


def test_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, less = {"unet": 3 * 10**9, "vae": 10**9}, ("run.precision=bf16", "methods.nf4={}")
    memory = Memory(parts, 5 * 10**8, saved=10**9, loading=8 * 10**9, less=less)
    assert memory.peak == 5_500_000_000
    monkeypatch.setattr("trainer.training.memory_estimate.free_memory", lambda: 9 * 10**9)
    first, loading, fits = memory_lines(memory, CPU)
    assert first.endswith("kept for the backward 1.0 GB: 5.5 GB in all at the peak")
    assert "loading takes 8.0 GB" in loading
    assert fits == "this machine has 9.0 GB free: it fits"
    monkeypatch.setattr("trainer.training.memory_estimate.free_memory", lambda: 7 * 10**9)
    *_, fits = memory_lines(memory, CPU)
    assert fits.startswith("this machine has 7.0 GB free, and 8.0 GB are needed: it does not fit;")
    assert fits.endswith("; it needs less with any of run.precision=bf16, methods.nf4={}")


def test_parts_that_rest_are_not_on_the_device(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["methods.new_token=null", "data.token=sks", "run.resolution=64", "data.augment=false"]
    recipe = recipe_of(tiny_folder, *words)
    memory = memory_of(recipe, *planned(recipe, CPU))
    assert memory.resting == ("text_encoder", "vae")
    weights, away = sum(memory.parts.values()), memory.parts["text_encoder"] + memory.parts["vae"]
    assert memory.on_device == max(weights + memory.state, memory.peak - away) < memory.peak
    assert memory.at(CPU.device) == memory.peak
    free = memory.on_device + 1
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, free))
    gpu = Placement(torch.device("cuda", 0))
    _, rests, *_, fits = memory_lines(memory, gpu)
    assert rests.startswith("text_encoder, vae leave cuda:0 while the denoiser trains, and come")
    assert fits.startswith("cuda:0 has") and fits.endswith("it fits")
    assert "leave" not in " ".join(memory_lines(memory, CPU))
    for word in ("run.cache_text=false", "run.cache_latents=false"):
        less = recipe_of(tiny_folder, *words, word)
        assert len(memory_of(less, *planned(less, CPU)).resting) == 1
    trained = recipe_of(tiny_folder)
    assert memory_of(trained, *planned(trained, CPU)).resting == ()


def test_free_memory_is_what_the_system_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, Callable[[], str]] = {
        "MEMINFO": lambda: "MemTotal:   9000 kB\nMemAvailable:   5000 kB\n",
        "LIMIT": lambda: "6000000\n",
        "USED": lambda: "2000000\n",
        "KINDS": lambda: "anon 500000\ninactive_file 700000\nactive_file 300000\nshmem 9\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text())
        monkeypatch.setattr(f"trainer.common.main_memory.{name}", tmp_path / name)
    assert free_memory() == 5_000_000  # with the files that fill what nobody needs
    (tmp_path / "KINDS").unlink()
    assert free_memory() == 4_000_000
    (tmp_path / "LIMIT").write_text("max\n")
    assert free_memory() == 5_120_000
    (tmp_path / "MEMINFO").unlink()
    assert (free_memory() or 0) > 10**8
    assert size(5_120_000) == "5.1 MB"


def test_parts_come_back_beside_the_gradients_and_moments() -> None:
    parts, resting = {"unet": 10, "text_encoder": 8}, ("text_encoder",)
    assert Memory(parts, state=30, saved=5, loading=0, resting=resting).on_device == 18 + 30
    assert Memory(parts, state=30, saved=50, loading=0, resting=resting).on_device == 10 + 80


def test_text_encoders_stay_for_captions_in_shards(tiny_folder: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "shards", 4)
    own = ["recipe=lora_folder", "data.source=shards", f"data.shards={tmp_path / 'shards'}"]
    recipe = load_recipe([*own, f"backbone={tiny_folder}", "data.buckets=0"])
    assert memory_of(recipe, *planned(recipe, CPU)).resting == ("vae",)


def test_only_what_can_be_set_is_said_to_need_less(tiny_folder: Path) -> None:
    fp8, nf4 = "run.base_precision.denoiser=fp8", "methods.nf4={}"

    def less(*words: str) -> tuple[str, ...]:
        recipe = recipe_of(tiny_folder, *words)
        place = choose_placement("cpu", recipe.run.precision, parts=recipe.run.base_precision)
        return memory_of(recipe, *planned(recipe, place)).less

    checkpoints, half = "run.gradient_checkpointing=true", "run.precision=bf16"
    every = {checkpoints, half, "a smaller run.resolution", "a smaller run.batch_size", fp8, nf4}
    assert set(less("run.precision=fp32")) == every
    assert set(less(checkpoints, half)) == every - {checkpoints, half}
    assert {fp8, nf4}.isdisjoint(less("run.base_precision={denoiser: fp8}"))
    whole = ("methods.lora=null", "methods.new_token=null", "data.token=sks", "methods.full={}")
    assert {fp8, nf4}.isdisjoint(less(*whole))


def test_a_start_that_predicts_something_else_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """By `check` as by `fit`: the earlier network predicts v."""
    words = ["recipe=lora", f"backbone={tiny_folder}", "data.class_word=bird", "tracker=none"]
    plain = load_recipe(words)
    path = tmp_path / "adapter.safetensors"
    model = load_base(plain.backbone, plain.backbone_name)
    plan = apply_methods(model, plain.methods)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {name: held[name] for name in plan.stored}
    save_adapter(path, tensors, recipe_header(plain), model.identity())
    assert refuse_unfit(load_recipe([*words, f"run.start_from={path}"])) is None
    other = load_recipe([*words, f"run.start_from={path}", "objective.target=eps"])
    with pytest.raises(ValueError, match=r"run\.start_from=.* predicts v.*, and this recipe's eps"):
        refuse_unfit(other)
