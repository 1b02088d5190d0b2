"""The family of DiT against stock diffusers: classes for prompts, pictures, what trains and is read
again, and what needs text and is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from edited import edit
from PIL import Image
from torch import Tensor
from two_steps import two_steps

from trainer.backbones import load_backbone
from trainer.backbones.class_names import ClassNames
from trainer.backbones.families import family_of
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective, add_noise
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted
from trainer.training.tasks.denoise import Denoise

VAE = Path(__file__).parents[2] / "data" / "tiny" / "vae"
LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "134": "crane", "517": "crane", "207": "dog"}
CLASSES = ["goldfish", "207"]
SEEDS = [3, 4]
CLOSE = 2 / 255
Open = Callable[[Path], Any]


@pytest.fixture(scope="session")
def class_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As DiT is published: the older name of the network's class, `id2label` in the index."""
    folder = tmp_path_factory.mktemp("backbone") / "dit_xl"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=8, out_channels=16,
            num_layers=2, sample_size=8,
        )  # fmt: skip
        for parameter in network.parameters():  # what tells blocks the class begins at 0 or near
            torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32)
    linear = DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False)
    DiTPipeline(network, vae, linear).save_pretrained(folder)
    edit(folder / "model_index.json", id2label=LABELS, transformer=["diffusers", OLD])
    edit(folder / "transformer" / "config.json", _class_name=OLD)
    return folder


OLD = "Transformer2DModel"


@pytest.fixture
def classes(class_folder: Path, open_folder: Open) -> Any:
    """A fresh backbone that a test may edit."""
    return open_folder(class_folder)


def stock(folder: Path) -> Any:
    pipe: Any = DiTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painted(pipe: Any, guidance: float = 4.0) -> Tensor:
    pictures: Tensor = pipe(
        [1, 207],
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        output_type="pt",
    ).images
    return pictures


def drawn(model: Any, guidance: float = 4.0, **options: Any) -> Tensor:
    how = Sampling(4, guidance, **options)
    return sample(model, CLASSES, SEEDS, settings=how) / 2 + 0.5


def batch_of(captions: list[str]) -> Batch:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch(0, [0, 1], captions, captions, torch.ones(2), pixels=pixels)


def trained(model: Any, tree: dict[str, Any], path: Path, folder: Path) -> Path:
    def batches(_: int) -> Batch:
        return batch_of(CLASSES)

    return two_steps(model, tree, path, folder=folder, batch_of=batches, lr=2e-2)


def test_a_folder_says_its_family(classes: Any, class_folder: Path) -> None:
    assert family_of(class_folder) == classes.family == "dit"
    assert (classes.target, classes.resolution, classes.text_length) == ("eps", 32, 0)
    assert classes.text_encoders == {} and classes.text_shapes == {"labels": ()}
    assert [site.kind for site in classes.sites] == ["self", "self"]
    assert {name.partition(".")[0] for name, _ in classes.named_parameters()} == {
        "transformer", "vae"
    }  # fmt: skip


def test_prompts_are_classes(classes: Any) -> None:
    prompts = ["tench", " TINCA  tinca ", "goldfish", "207", "dog", "", "999"]
    labels = classes.encode_prompts(prompts).labels
    assert labels.tolist() == [0, 0, 1, 207, 207, 1000, 999]
    for wrong, message in {
        "goldfsh": r"'goldfsh' is no class .* reads no text; did you mean goldfish\?",
        "a photo of a dog in space": r"reads no text; its model_index.json names all",
        "1000": r"'1000' is no class: their numbers are 0 to 999",
        "crane": r"'crane' is the name of classes 134 and 517; give the number",
    }.items():
        with pytest.raises(ValueError, match=message):
            classes.encode_prompts([wrong])
    with pytest.raises(ValueError, match=r"reads no text; give a number, 0 to 9$"):
        ClassNames(10).number("goldfish")


@torch.no_grad()
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluating"])
def test_a_prediction_is_the_call_of_the_stock_network(
    mode: bool, classes: Any, class_folder: Path
) -> None:
    """In training mode too, in which diffusers' own layers drop labels at random."""
    x_t, t = torch.randn(2, 8, 8, 8), torch.tensor([3, 700])
    classes.train(mode)
    own = classes.predict(x_t, t, classes.encode_prompts(["goldfish", ""]))
    network = stock(class_folder).transformer
    wanted = network(x_t, timestep=t, class_labels=torch.tensor([1, 1000])).sample
    assert wanted.shape == (2, 16, 8, 8)
    torch.testing.assert_close(own, wanted[:, :8], rtol=0, atol=1e-6)
    other = classes.predict(x_t, t, classes.encode_prompts(["dog", "0"]))
    assert float((own - other).abs().amin(0).max()) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_stock_pipeline(
    guidance: float, classes: Any, class_folder: Path
) -> None:
    wanted = painted(stock(class_folder), guidance)
    assert float((drawn(classes, guidance) - wanted).abs().max()) <= CLOSE
    assert float(wanted.std()) > 0.05


def test_noise_is_on_the_linear_vp_path(classes: Any) -> None:
    """x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise with a_t the product of 1 - beta, which grows from
    0.0001 to 0.02; the target is the noise."""
    betas = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
    alpha = torch.cumprod(1 - betas, 0)[[3, 700]].float().view(2, 1, 1, 1)
    x0, noise = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    objective = Objective(classes.target, classes.alphas_cumprod)
    own = add_noise(objective, x0, noise, torch.tensor([3, 700]))
    torch.testing.assert_close(own, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise)


def test_dropped_captions_are_no_class(classes: Any) -> None:
    task = Denoise(classes, Objective("eps", classes.alphas_cumprod), caption_dropout=1.0)
    with torch.no_grad():
        assert task.encode(batch_of(CLASSES)).condition.labels.tolist() == [1000, 1000]
        assert task.encode(batch_of(CLASSES), "validate").condition.labels.tolist() == [1, 207]


def test_other_shapes_than_squares_are_refused(classes: Any) -> None:
    with pytest.raises(ValueError, match=r"square pictures only, and one of 48x32 is asked for"):
        drawn(classes, size=(32, 48))
    assert drawn(classes, size=(48, 48)).shape == (2, 3, 48, 48)


LORA = {"lora": {"sites": "self", "rank": 2}}
TREES = {
    "lora": LORA,
    "selective": {"selective": {"sites": "self", "projections": ["k", "v"]}},
    "full": {"full": {}},
}


@pytest.mark.parametrize("name", TREES)
def test_what_trains_is_saved_and_read_again(
    name: str, classes: Any, class_folder: Path, tmp_path: Path
) -> None:
    before = drawn(classes)
    path = trained(classes, TREES[name], tmp_path / "a.safetensors", class_folder)
    wanted = drawn(classes.eval())
    loaded, _ = load_adapted(path)
    assert torch.equal(drawn(loaded.eval()), wanted)
    assert float((wanted - before).abs().max()) > 1e-3


@pytest.mark.parametrize("written", ["merged", "peft"])
def test_exports_are_proven(written: str, classes: Any, class_folder: Path, tmp_path: Path) -> None:
    """The call that the README prints names a class; a merged folder keeps the classes' names,
    which stock diffusers alone loses on saving."""
    path = trained(classes, LORA, tmp_path / "a.safetensors", class_folder)
    lines: list[str] = []
    out = export(path, tmp_path / "out", written, say=lines.append)
    assert any("largest difference" in line for line in lines)
    assert "class_labels=[0]" in (out / "README.md").read_text()
    wanted = drawn(classes.eval())
    if written == "merged":
        pipe = stock(out)
        assert pipe.labels["goldfish"] == 1
        assert backbone_spec(str(out)).family == "dit"
    else:
        from peft import PeftModel

        pipe = stock(class_folder)
        (config,) = out.rglob("adapter_config.json")
        adapted = PeftModel.from_pretrained(pipe.transformer, config.parent)
        pipe.transformer = adapted.base_model.model
    assert float((painted(pipe) - wanted).abs().max()) <= CLOSE


@pytest.mark.parametrize("written", ["diffusers", "kohya", "comfyui", "custom_diffusion"])
def test_formats_of_other_tools_are_refused(
    written: str, classes: Any, class_folder: Path, tmp_path: Path
) -> None:
    path = trained(classes, LORA, tmp_path / "a.safetensors", class_folder)
    with pytest.raises(ValueError, match=rf"format={written}"):
        export(path, tmp_path / "out", written, say=lambda line: None)


REFUSED = {
    "new_token": ({"tokens": ["<v1>"]}, "methods.new_token: this backbone has no text encoder"),
    "word_embedding": ({"tokens": ["dog"]}, "methods.word_embedding: this backbone has no text"),
    "full": ({"text_encoder": True}, "methods.full: this backbone has no text encoder"),
    "lora": (
        {"sites": "self", "text_encoder": ["q"]},
        "methods.lora: text_encoder: no layers of q found in this backbone, which has no text",
    ),
    "selective": ({"sites": "cross"}, "methods.selective: .*'cross'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_need_text_are_refused(name: str, classes: Any) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        apply_methods(classes, methods_of({name: options}))


SPOILED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pixart": ("transformer/config.json", {"norm_type": "ada_norm_single"}, "not told a class"),
    "channels": ("transformer/config.json", {"in_channels": 4}, "takes 4 channels"),
    "pipeline": ("model_index.json", {"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
    "flow": (
        "scheduler/scheduler_config.json",
        {"prediction_type": "flow_prediction"},
        "prediction_type is 'flow_prediction'",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_is_refused(name: str, class_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(class_folder, tmp_path / "copy"))
    file, changes, message = SPOILED[name]
    edit(copy / file, **changes)
    spec = backbone_spec(str(class_folder)).model_copy(update={"folder": str(copy)})
    with pytest.raises(ValueError, match=message):
        load_backbone(spec, "mine")


@pytest.fixture
def photos_of_classes(tmp_path: Path) -> Path:
    for name in ("1_goldfish", "1_dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(2):
            noise = Image.effect_noise((40, 40), 90 + number).convert("RGB")
            noise.save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def words_of(folder: Path, photos: Path) -> list[str]:
    return [
        "recipe=lora_folder", f"backbone={folder}", f"data.folder={photos}", "data.buckets=0",
        "methods.lora.sites=self", "tracker=none", "run.steps=2", "run.batch_size=2",
        "optim.warmup=0",
    ]  # fmt: skip


def test_a_run_on_folders_that_are_named_as_classes(
    class_folder: Path, photos_of_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from trainer.cli import check, fit, sample

    monkeypatch.chdir(tmp_path)
    words = words_of(class_folder, photos_of_classes)
    assert check.run(words) == 0
    assert "captions: 4, each a class" in capsys.readouterr().out
    previews = ["preview.every=2", "preview.steps=2", "preview.prompts=[goldfish]"]
    assert fit.run([*words, *previews, "run.id=one"]) == 0
    run = tmp_path / "runs" / "lora_folder" / "one"
    assert sample.run([f"adapter={run}", "prompt=dog", "steps=2", "out=pictures"]) == 0
    assert list((tmp_path / "pictures").glob("*.png"))
    with pytest.raises(ValueError, match=r"prompt: 'dogg' is no class .*did you mean dog\?"):
        sample.run([f"adapter={run}", "prompt=dogg", "steps=2", "out=pictures"])


def test_a_caption_or_prompt_that_is_no_class_is_refused_before_the_run(
    class_folder: Path, photos_of_classes: Path
) -> None:
    from trainer.config.captions import check_words

    words = words_of(class_folder, photos_of_classes)
    with pytest.raises(RecipeError, match=r"preview\.prompts: 'gold fish' is no class"):
        check_words(load_recipe([*words, "preview.every=2", "preview.prompts=[gold fish]"]))
    (photos_of_classes / "1_dog").rename(photos_of_classes / "1_a dog on a hill")
    with pytest.raises(RecipeError, match=r"the caption 'a dog on a hill' is no class"):
        check_words(load_recipe(words))
    with pytest.raises(ValueError, match=r"text\.max_tokens=150: this backbone has no text enco"):
        load_recipe([*words, "text.max_tokens=150"])


def test_the_backbone_of_the_hub() -> None:
    """The publisher's main branch has pickles alone; the revision is the one with safetensors."""
    spec = backbone_spec("dit_xl")
    assert (spec.family, spec.hub, spec.revision) == (
        "dit", "facebook/DiT-XL-2-256", "refs/pr/1"
    )  # fmt: skip
