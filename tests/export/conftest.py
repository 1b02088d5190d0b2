"""Adapters to export, and stand-ins for model families without a backbone: two text encoders as in
SDXL, and transformers."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import traits_of
from torch import Tensor, nn

from trainer.attention.condition import Condition
from trainer.backbones.long_prompts import Prompts

TREES: dict[str, dict[str, Any]] = {
    # several ranks, an alpha that is not the rank, a text encoder, other layers than attention
    "lora": {
        "lora": {
            "sites": "all",
            "rank": 4,
            "alpha": 6,
            "ranks": {"*attn1.to_q": 2, "*self_attn.v_proj": 3},
            "layers": ["*ff.net.2", "*conv1"],
            "text_encoder": ["v", "out"],
        }
    },
    "text": {"lora": {"sites": "cross", "projections": ["k"], "rank": 2, "text_encoder": ["q"]}},
    "mlp": {"lora": {"sites": None, "rank": 2, "alpha": 3, "text_encoder": ["fc1", "fc2"]}},
    "pissa": {"lora": {"sites": "cross", "projections": ["k", "v"], "rank": 2, "init": "pissa"}},
    "dora": {
        "dora": {
            "sites": "cross",
            "rank": 2,
            "alpha": 3,
            "layers": ["*conv1"],
            "text_encoder": ["v"],
        }
    },
    "custom": {
        "selective": {"sites": "cross", "detach_first_token": True},
        "new_token": {"tokens": ["<v1>", "sks"], "init": "fox"},
    },
    "projections": {"selective": {"sites": "all", "projections": ["q", "out"]}},
    "full": {"full": {}},
    "loha": {
        "peft_adapter": {
            "type": "loha",
            "layers": ["*ff.net.2", "*conv1"],
            "text_encoder": ["q", "fc1"],
            "options": {"r": 4, "alpha": 6, "use_effective_conv2d": True},
            "ranks": {"*conv1": 2},
        }
    },
    "lokr": {
        "peft_adapter": {
            "type": "lokr",
            "text_encoder": ["v"],
            "options": {"r": 2, "alpha": 3, "decompose_factor": 4},
        }
    },
    "full_lokr": {
        "peft_adapter": {"type": "lokr", "sites": "cross", "options": {"r": 64, "alpha": 16}}
    },
    "vectors": {"new_token": {"tokens": ["<v1>", "<v1>_1", "<v2>"], "init": "fox"}},
    "words": {"new_token": {"tokens": ["<v1>"], "init": "fox"}},
}
Trained = Callable[[str], Path]
Written = Callable[[str, str], tuple[Path, tuple[str, ...]]]


@torch.no_grad()
def disturb(model: Any, names: tuple[str, ...]) -> None:
    """Changes every named tensor as if it had trained, by a tenth of its standard deviation, or of
    0.05 where that is larger."""
    own = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for name in names:
        value = own[name]
        spread = max(float(value.std()) if value.numel() > 1 else 0.0, 0.05)
        value += 0.1 * spread * torch.randn(value.shape, generator=generator)


@pytest.fixture(scope="session")
def trained(
    tiny_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    open_folder: Callable[[Path], Any],
) -> Trained:
    """The adapter file of one of `TREES`, made once."""
    folder = tmp_path_factory.mktemp("adapters")

    def make(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save_disturbed(path, open_folder(tiny_folder), tiny_folder, TREES[name])
        return path

    return make


@pytest.fixture(scope="session")
def written(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """`written(name, format)`: the export of one of `TREES`, in fp32, into a folder `my_dog` that
    no test changes, and the lines that said so; made once, by a user whose files nobody else may
    read."""
    from trainer.export.export import export

    @functools.cache
    def once(name: str, form: str) -> tuple[Path, tuple[str, ...]]:
        said: list[str] = []
        before = os.umask(0o077)
        try:
            place = tmp_path_factory.mktemp("written") / "my_dog"
            return export(trained(name), place, form, say=said.append), tuple(said)
        finally:
            os.umask(before)

    return once


def save_disturbed(
    path: Path, model: Any, backbone: Path, methods: dict[str, Any], **sections: Any
) -> None:
    """Saves the adapter that these methods make of a model, as if it had trained."""
    from trainer.config.load import methods_of
    from trainer.methods.apply import apply_methods
    from trainer.runs.adapter import save_adapter

    plan = apply_methods(model, methods_of(methods))
    disturb(model, plan.names)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {key: own[key] for key in plan.stored}
    header = {"backbone": str(backbone), "methods": methods, **sections}
    save_adapter(path, tensors, tree=header, identity=model.identity())


@pytest.fixture(scope="session")
def bundle_of(trained: Trained, tiny_folder: Path, open_folder: Callable[[Path], Any]) -> Any:
    """The bundle of one of `TREES`, extracted from the adapted model."""
    from safetensors.torch import load_file

    from trainer.export.extract import extract
    from trainer.runs.adapter import load_adapted

    def read(name: str) -> Any:
        path = trained(name)
        return extract(load_adapted(path)[0], open_folder(tiny_folder), load_file(path))

    return read


@pytest.fixture(scope="session")
def same() -> Callable[..., None]:
    """`same(one, other, base)` asserts that two bundles change the same layers by the same dW and
    db, and hold the same words with the same rows."""
    from trainer.export.apply_bundle import full_delta, layer_at

    def check(one: Any, other: Any, base: Any) -> None:
        assert set(one.layers) == set(other.layers)
        for path in one.layers:
            a, b = (
                full_delta(bundle.layers[path], layer_at(base, path)) for bundle in (one, other)
            )
            for left, right in ((a.weight, b.weight), (a.bias, b.bias)):
                assert (left is None) == (right is None), path
                if left is not None:
                    torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
        assert {word: set(rows) for word, rows in one.tokens.items()} == {
            word: set(rows) for word, rows in other.tokens.items()
        }
        for word, rows in one.tokens.items():
            assert all(torch.equal(row, other.tokens[word][part]) for part, row in rows.items())

    return check


class StandIn(nn.Module):
    """The interface of a backbone that exports use, around any denoiser."""

    name, target = "stand-in", "eps"
    resolution, divisor = 64, 8
    denoiser_name = "transformer"
    text_encoders: dict[str, nn.Module]
    tokenizers: dict[str, Any]

    def __init__(self, denoiser: nn.Module, stock: Any, channels: int) -> None:
        super().__init__()
        self.add_module(self.denoiser_name, denoiser)
        self.stock, self.latent_channels = stock, channels
        self.text_encoders, self.tokenizers = {}, {}
        self.prompts = Prompts(self, "text_encoder")
        self.given_frames = None
        self.extras: dict[str, Any] = {}
        self.input_channels: dict[str, Any] = {}
        self.further_conditions: dict[str, Any] = {}

    @property
    def denoiser(self) -> Any:
        return getattr(self, self.denoiser_name)

    @property
    def host(self) -> Any:
        from trainer.attention.host import Host

        return Host.attach(self.denoiser, traits_of(self.denoiser))

    @property
    def sites(self) -> Any:
        return self.host.sites

    def pipeline(self) -> Any:
        return self.stock(self)

    def encode_prompts(self, prompts: list[str]) -> Condition:
        return Condition(
            torch.randn(len(prompts), 5, 16, generator=torch.Generator().manual_seed(3))
        )

    def added(self, condition: Condition) -> dict[str, Any]:
        """Further arguments of the denoiser."""
        return {}

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output: Tensor = self.denoiser(
            x_t,
            timestep=t,
            encoder_hidden_states=condition.tokens,
            **self.added(condition),
        ).sample
        return output


class TwoEncoders(StandIn):
    """SDXL: the features of two text encoders side by side, and the pooled ones of the second."""

    denoiser_name = "unet"

    def __init__(self, denoiser: nn.Module, stock: Any, encoders: Any, tokenizers: Any) -> None:
        super().__init__(denoiser, stock, 4)
        for part, encoder in encoders.items():
            self.add_module(part, encoder)
        self.tokenizers = tokenizers
        self.text_encoders = encoders

    def encode_prompts(self, prompts: list[str]) -> Condition:
        hidden = []
        for part, encoder in self.text_encoders.items():
            ids = self.tokenizers[part](prompts, padding="max_length", return_tensors="pt")
            output = encoder(ids.input_ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return Condition(torch.cat(hidden, -1), pooled=output.text_embeds)

    def added(self, condition: Condition) -> dict[str, Any]:
        pooled: Any = condition.pooled
        facts = {"text_embeds": pooled, "time_ids": torch.ones(len(pooled), 6)}
        return {"added_cond_kwargs": facts}


@pytest.fixture(scope="session")
def pixart() -> Callable[[], StandIn]:
    """Makes a seeded PixArt transformer of two blocks; its stock pipeline has no LoRA loader."""
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    class Pixart(StandIn):
        def added(self, condition: Condition) -> dict[str, Any]:
            return {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}

    def make() -> StandIn:
        torch.manual_seed(0)
        network = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, sample_size=8, cross_attention_dim=16, caption_channels=16,
        )  # fmt: skip
        nn.init.normal_(network.proj_out.weight)
        stock = lambda model: PixArtSigmaPipeline(None, None, None, model.transformer, None)  # noqa: E731
        return Pixart(network, stock, 4).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def sana() -> Callable[[], StandIn]:
    """Makes a seeded Sana transformer, a family whose stock pipeline loads LoRA."""
    from diffusers import SanaPipeline, SanaTransformer2DModel

    def make() -> StandIn:
        torch.manual_seed(0)
        network = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
            num_layers=2, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=16, sample_size=8, patch_size=1,
        )  # fmt: skip
        stock = lambda model: SanaPipeline(None, None, None, model.transformer, None)  # noqa: E731
        return StandIn(network, stock, 4).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def sdxl(tiny_folder: Path) -> Callable[[], StandIn]:
    """Makes a seeded small pipeline of SDXL's parts."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    def make() -> StandIn:
        torch.manual_seed(0)
        first = CLIPTextModel.from_pretrained(tiny_folder / "text_encoder", dtype=torch.float32)
        second = CLIPTextModelWithProjection(first.config)
        network = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * first.config.hidden_size, attention_head_dim=2,
            transformer_layers_per_block=(1, 2), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + first.config.projection_dim,
        )  # fmt: skip
        tokenizers = {
            part: CLIPTokenizer.from_pretrained(tiny_folder / "tokenizer")
            for part in ("text_encoder", "text_encoder_2")
        }

        def stock(model: Any) -> Any:
            encoders = model.text_encoders.values()
            words = model.tokenizers.values()
            return StableDiffusionXLPipeline(None, *encoders, *words, model.unet, None)

        encoders = {"text_encoder": first, "text_encoder_2": second}
        return TwoEncoders(network, stock, encoders, tokenizers).eval().requires_grad_(False)

    return make


@pytest.fixture
def job_of() -> Callable[..., Any]:
    """`job_of(make_base, tree)`: a job whose model has these methods, disturbed as if trained."""
    from trainer.config.load import methods_of
    from trainer.export.job import Job
    from trainer.methods.apply import apply_methods

    def make(make_base: Callable[[], StandIn], tree: dict[str, Any]) -> Any:
        adapted = make_base()
        plan = apply_methods(adapted, methods_of(tree))
        disturb(adapted, plan.names)
        return Job(adapted.eval(), make_base, stored=plan.stored, title="title")

    return make


@pytest.fixture
def read_back(tmp_path: Path) -> Callable[..., dict[str, float]]:
    """Writes a job in a format and returns the largest difference of each of its readers; asserts
    that the adapter itself makes a much larger one."""
    from trainer.export.find_format import find_format
    from trainer.export.probe import Probe, difference

    def check(name: str, job: Any, folder: Path | None = None) -> dict[str, float]:
        chosen, folder = find_format(name), folder or tmp_path / name
        folder.mkdir()
        probe = Probe(job.adapted, job.bundle.tokens)
        wanted = probe(job.adapted)
        assert difference(probe(job.base), wanted) > 1e-3
        chosen.write(job, folder, torch.float32)
        models = {name: load(folder, job.make_base()) for name, load in chosen.readers.items()}
        return {name: difference(probe(model), wanted) for name, model in models.items() if model}

    return check
