"""Export: a folder that stock diffusers loads by itself and that gives our sampler's picture, and
what holds for every format. Each format is tested in `formats/`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.attention.call import SiteCall
from trainer.attention.extras import register_extra
from trainer.attention.op import Traits
from trainer.config.header import read_header
from trainer.config.load import methods_of
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import base_of, export, refuse_ops
from trainer.export.find_format import format_names
from trainer.export.formats.merged import merge
from trainer.export.probe import Probe
from trainer.export.proof import Proof, prove
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import save_adapter

METHODS = {
    "selective": {"sites": "cross", "projections": ["k", "v"], "detach_first_token": True},
    "new_token": {"tokens": ["<v1>", "sks"], "init": ["fox", "cat"]},
}
PROMPT = "a <v1> left of a sks"


@pytest.fixture
def trained(
    tiny: Any, tiny_folder: Path, tmp_path: Path, train: Callable[..., list[float]]
) -> tuple[Path, Any]:
    """An adapter of two training steps, and the model it was saved from."""
    plan = apply_methods(tiny, methods_of(METHODS))
    train(tiny, plan)
    parameters = dict(tiny.named_parameters())
    path = tmp_path / "adapter.safetensors"
    tree = {"backbone": str(tiny_folder), "methods": METHODS}
    save_adapter(
        path, {name: parameters[name] for name in plan.names}, tree=tree, identity=tiny.identity()
    )
    return path, tiny


def test_merged_is_a_stock_pipeline(trained: tuple[Path, Any], tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    path, model = trained
    out = export(path, tmp_path / "out")
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        PROMPT,
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=4,
        guidance_scale=4.0,
        output_type="pt",
    ).images
    own = sample(model, [PROMPT], [7], settings=Sampling(steps=4, guidance=4.0)) / 2 + 0.5
    assert float((picture - own).abs().max()) < 2 / 255
    plain = (
        sample(model, ["a fox left of a cat"], [7], settings=Sampling(steps=4, guidance=4.0)) / 2
        + 0.5
    )
    assert float((plain - own).abs().max()) > 2 / 255


def test_merged_holds_safetensors_only_and_leaves_no_part(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    out = export(trained[0], tmp_path / "out")
    weights = {item.suffix for item in out.rglob("*") if item.stat().st_size > 100_000}
    assert weights <= {".safetensors", ".json"}
    assert not list(out.rglob("*.bin"))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter.safetensors", "out"]


def test_merged_can_be_a_backbone_again(
    trained: tuple[Path, Any], tmp_path: Path, open_folder: Callable[[Path], Any]
) -> None:
    path, model = trained
    again = open_folder(export(path, tmp_path / "out"))
    wanted = sample(model, [PROMPT], [7], settings=Sampling(steps=2))
    torch.testing.assert_close(
        sample(again, [PROMPT], [7], settings=Sampling(steps=2)), wanted, rtol=0, atol=1e-4
    )


def test_the_vocabulary_grows_with_the_tokens(trained: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = trained
    old = model.text_encoder.get_input_embeddings().table.num_embeddings
    out = export(path, tmp_path / "out")
    config = json.loads((out / "text_encoder" / "config.json").read_text())
    assert config["vocab_size"] == old + 2


def test_dtype_is_what_is_asked(trained: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = export(trained[0], tmp_path / "out", dtype="float16")
    for file in out.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.float16}


def test_nothing_is_written_over(trained: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"out=.* exists"):
        export(trained[0], out)
    assert [item.name for item in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"format_name": "ckpt"}, "format=ckpt: no such format", id="format"),
        pytest.param({"dtype": "int4"}, "dtype=int4: no such dtype", id="dtype"),
        pytest.param({"rank": 2}, "rank=2 is for format=comfyui, diffusers,", id="rank"),
    ],
)
def test_unknown_options_are_refused_before_loading(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "no adapter here", tmp_path / "out", **options)


def test_what_stock_cannot_hold_is_refused(tiny: Any) -> None:
    from trainer.ops.adapters.token_rows import ExtendedEmbedding

    table = torch.nn.Embedding(2, 3)
    tiny.unet.add_module("extra", ExtendedEmbedding(table, [torch.zeros(3)]))
    with pytest.raises(ValueError, match=r"cannot carry unet\.extra \(ExtendedEmbedding\)"):
        merge(tiny)


def test_a_module_beside_the_denoiser_is_refused(tiny: Any) -> None:
    register_extra(tiny, "projector", torch.nn.Linear(2, 3), owner="adapter")
    with pytest.raises(ValueError, match=r"cannot carry extras\.projector, 1 such modules"):
        merge(tiny)


def test_every_format_is_listed_in_the_refusal(tmp_path: Path) -> None:
    listed = ", ".join(format_names())
    known = (
        "animatediff, comfyui, custom_diffusion, diff, diffusers, ip_adapter, kohya, merged, peft"
    )
    assert listed == known
    with pytest.raises(ValueError, match=f"format=ckpt: no such format; there are: {listed}"):
        export(tmp_path / "none", tmp_path / "out", "ckpt")


def test_what_was_proven_is_said(trained: tuple[Path, Any], tmp_path: Path) -> None:
    said: list[str] = []
    export(trained[0], tmp_path / "out", say=said.append)
    line, printed = said
    assert printed.startswith("the call in README.md gives a picture; largest difference ")
    assert line.startswith("merged, read back by from_pretrained: largest difference ")
    assert "(allowed 1e-05; the adapter itself makes " in line


def test_a_file_that_loads_and_does_nothing_is_refused(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path, model = trained
    out = export(path, tmp_path / "out", "kohya", say=lambda line: None)
    file = out / "out.safetensors"
    save_file({key: value * 0 for key, value in load_file(file).items()}, file)
    probe = Probe(model, ["<v1>", "sks"])
    tree, _ = read_header(path)

    proof = Proof(
        "kohya", lambda: base_of(tree), probe=probe, wanted=probe(model), say=lambda line: None
    )
    with pytest.raises(ValueError, match=r"differs by \S+ from the model's, and \S+ is allowed"):
        prove(proof, out)


def proof_of(model: Any) -> Proof:
    probe = Probe(model, ())
    return Proof("kohya", lambda: model, probe=probe, wanted=probe(model), say=lambda line: None)


class Louder:
    """An op that changes what the model generates."""

    name = "louder"
    traits = Traits()

    def kv(self, q: Any, k: Any, v: Any, call: SiteCall) -> Any:
        return q, k, 2 * v


def test_an_op_that_only_trains_is_left_out(tiny: Any) -> None:
    from trainer.ops.detach_first_token import DetachFirstToken

    tiny.host.install(DetachFirstToken(), tiny.sites)
    refuse_ops(tiny, proof_of(tiny))
    assert not any(processor.ops for processor in tiny.host.processors.values())


@pytest.mark.parametrize("name", ["kohya", "merged"])
def test_temporal_layers_are_not_silently_left_out(
    name: str, tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    """Temporal layers do not change single pictures, so a proof by pictures would not notice."""
    chosen: dict[str, Any] = {"animatediff": {}, "lora": {"sites": "cross", "rank": 2}}
    plan = apply_methods(tiny, methods_of(chosen))
    parameters = dict(tiny.named_parameters())
    path = tmp_path / "adapter.safetensors"
    tree = {"backbone": str(tiny_folder), "methods": chosen}
    save_adapter(
        path, {name: parameters[name] for name in plan.names}, tree=tree, identity=tiny.identity()
    )
    with pytest.raises(ValueError, match=f"format={name} cannot carry the .* temporal layers"):
        export(path, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_an_op_that_acts_at_inference_is_named(
    tiny_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    model = open_folder(tiny_folder)
    model.host.install(Louder(), model.sites[:2])
    with pytest.raises(ValueError, match=r"format=kohya cannot carry louder \(on down_blocks\S+"):
        refuse_ops(model, proof_of(model))


@pytest.mark.parametrize("name", ["diffusers", "comfyui"])
def test_a_reduced_rank_reports_what_it_keeps(
    name: str, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    said: list[str] = []
    out = export(trained[0], tmp_path / "out", name, rank=2, say=said.append)
    assert said[0].startswith("rank 2: every layer keeps ")
    assert "the output differs from the trained model's by" in said[0]
    assert any("read back by" in line for line in said[1:])
    from safetensors.torch import load_file

    (file,) = out.glob("*.safetensors")
    downs = [v for k, v in load_file(file).items() if ".lora_A." in k or ".lora_down." in k]
    assert {len(value) for value in downs} == {2}


def test_a_base_in_four_bits_is_proven_in_four_bits(
    tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    tree = {"nf4": {"min_size": 1024}, "lora": {"sites": "all", "rank": 2}}
    plan = apply_methods(tiny, methods_of(tree))
    own = dict(tiny.named_parameters())
    with torch.no_grad():
        for name in plan.names:
            own[name] += 0.05
    path = tmp_path / "adapter.safetensors"
    header = {"backbone": str(tiny_folder), "methods": tree}
    save_adapter(
        path, {name: own[name] for name in plan.stored}, tree=header, identity=tiny.identity()
    )
    said: list[str] = []
    export(path, tmp_path / "out", "kohya", say=said.append)
    assert said[0].startswith("proven on the base as methods.nf4 stores it")
    assert len(said) == 4
    assert "it differs by" in said[-1] and "on the plain backbone" in said[-1]
