"""Where a model goes, and what is held in half precision: less memory, and not a bit of difference
from rounding at every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.backbones.device import (
    CPU,
    Placement,
    choose_placement,
    pictures_at_once,
    place,
    proving,
    slow_precision,
)
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.methods.apply import apply_methods
from trainer.training.build import placement_of

BF16 = Placement(torch.device("cpu"), "bf16")


@torch.no_grad()
def predicted(model: Any) -> Tensor:
    x = torch.randn(2, model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    condition = model.encode_prompts(["a fox", "a <v1> here"])
    found: Tensor = model.predict(x, torch.tensor([10, 700]), condition)
    return found


def weights(model: Any) -> dict[torch.dtype, int]:
    """Bytes by type, of all but the VAE."""
    found: dict[torch.dtype, int] = {}
    for part in (model.denoiser, model.text_encoder):
        for value in part.parameters():
            found[value.dtype] = found.get(value.dtype, 0) + value.nbytes
    return found


@pytest.mark.parametrize("folder", ["tiny_folder", "dit_folder"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_held_weights_compute_what_autocast_does(
    folder: str, precision: str, request: pytest.FixtureRequest, open_folder: Any
) -> None:
    where, path = Placement(torch.device("cpu"), precision), request.getfixturevalue(folder)
    exact = predicted(open_folder(path).requires_grad_(False))
    rounded = place(open_folder(path).requires_grad_(False), where, hold=False)
    held = place(open_folder(path).requires_grad_(False), where)
    assert torch.equal(predicted(held), predicted(rounded))
    assert predicted(held).dtype == torch.float32
    assert 0 < (predicted(held) - exact).abs().max() < 0.1 * exact.abs().max()
    before, after = weights(rounded), weights(held)
    assert sum(after.values()) < 0.7 * sum(before.values())


@pytest.mark.parametrize(("has", "kind"), [(True, torch.bfloat16), (False, torch.float32)])
def test_fast_is_bf16_where_the_processor_has_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, has: bool, kind: torch.dtype
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    place(tiny.requires_grad_(False), choose_placement("cpu", "fast"))
    assert tiny.computes_in == tiny.unet.conv_in.weight.dtype == kind
    assert slow_precision(tiny) is None
    place(tiny, choose_placement("cpu", "bf16"))
    assert tiny.computes_in == torch.bfloat16
    assert (slow_precision(tiny) is None) == has


def test_a_build_without_onednn_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that for Macs; there the function that tells about bf16 is not there at all."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert choose_placement("cpu", "fast").dtype(torch.float16) == torch.float32


def test_what_trains_or_is_stored_stays_in_fp32(tiny: Any) -> None:
    plan = apply_methods(tiny, methods_of({"lora": {"rank": 2}, "new_token": {}}))
    stored = next(n for n, _ in tiny.unet.named_parameters() if n.endswith("base_layer.weight"))
    place(tiny, BF16, [f"unet.{stored}"])
    own = dict(tiny.named_parameters())
    assert all(own[name].dtype == torch.float32 for name in plan.names)
    assert own[f"unet.{stored}"].dtype == torch.float32
    kinds = {name: value.dtype for name, value in own.items()}
    assert kinds["unet.conv_in.weight"] == kinds["unet.conv_in.bias"] == torch.bfloat16
    assert all(kind == torch.float32 for name, kind in kinds.items() if "norm" in name)
    assert all(kind == torch.float32 for name, kind in kinds.items() if name.startswith("vae."))


def test_nothing_moves_on_a_cpu_by_default(tiny: Any) -> None:
    before = {name: value.data_ptr() for name, value in tiny.named_parameters()}
    wanted = predicted(tiny)
    assert place(tiny, choose_placement("cpu")) is tiny
    assert {name: value.data_ptr() for name, value in tiny.named_parameters()} == before
    assert torch.equal(predicted(tiny), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auto_is_as_the_weights_were_published(
    dtype: torch.dtype, tiny: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    import shutil

    folder = tmp_path / "published"
    shutil.copytree(tiny_folder, folder)
    tiny.unet.to(dtype).save_pretrained(folder / "unet")
    model = load_backbone(backbone_spec(str(folder)), str(folder))
    assert model.published == dtype
    assert next(model.unet.parameters()).dtype == torch.float32  # it is read exactly
    assert CPU.dtype(model.published) == torch.float32
    gpu = torch.device("cuda", 0)
    assert Placement(gpu).dtype(model.published) == dtype
    assert Placement(gpu, "bf16").dtype(model.published) == torch.bfloat16


def test_the_choice_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, mps = torch.device("cuda", 0), torch.device("mps")
    for gpu, apple, wanted in (
        (True, True, cuda),
        (False, True, mps),
        (False, False, torch.device("cpu")),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda apple=apple: apple)
        assert choose_placement().device == wanted
    with pytest.raises(ValueError, match="finds no such device on this machine; give device=cpu"):
        choose_placement("cuda")
    with pytest.raises(ValueError, match="no such device; there are auto, cpu, mps, cuda"):
        choose_placement("tpu")
    with pytest.raises(ValueError, match="there are auto, fast, fp32, bf16, fp16"):
        choose_placement("cpu", "fp8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_placement("cuda", rank=1).device == torch.device("cuda", 1)
    assert choose_placement("cuda:1", rank=0).device == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="cuda:2: this machine has 2 GPUs"):
        choose_placement("cuda:2")


def test_each_process_has_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    run = load_recipe(["recipe=lora", "run.devices=4"]).run
    assert placement_of(run).device == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert placement_of(run).device == torch.device("cuda", 3)


def test_apples_gpu_knows_bf16_from_macos_14_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def newer(major: int, minor: int) -> bool:
        asked.append((major, minor))
        return known

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", newer)
    known = True
    assert choose_placement("mps", "bf16").device == torch.device("mps")
    assert choose_placement("mps", "fast").dtype(torch.float16) == torch.bfloat16
    assert choose_placement("mps").dtype(torch.bfloat16) == torch.bfloat16
    known = False
    with pytest.raises(ValueError, match="from macOS 14 on; give precision=fp16 or fp32"):
        choose_placement("mps", "bf16")
    assert choose_placement("mps", "fast").dtype(torch.float16) == torch.float32
    assert choose_placement("mps").dtype(torch.bfloat16) == torch.float32
    assert choose_placement("mps").dtype(torch.float16) == torch.float16
    assert choose_placement("mps", "fp16").dtype(torch.float32) == torch.float16
    assert set(asked) == {(14, 0)}


def test_a_mac_has_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"run\.device=mps is one GPU, and run\.devices=2"):
        load_recipe(["recipe=lora", "run.device=mps", "run.devices=2"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    run = load_recipe(["recipe=lora", "run.devices=2"]).run
    with pytest.raises(
        ValueError, match=r"a Mac has one GPU.*give run\.devices=1 and run\.nodes=1"
    ):
        placement_of(run)


def test_the_earlier_name_of_the_device_is_read() -> None:
    run = load_recipe(["recipe=lora", "run.accelerator=cpu"]).run
    assert placement_of(run).device == torch.device("cpu") and run.device == "cpu"


def test_proofs_are_exact_and_end_on_the_cpu(tiny: Any) -> None:
    """A GPU rounds what it multiplies by default: convolutions to 10 bits."""
    convolution = torch.backends.cudnn
    before = convolution.allow_tf32
    assert before  # torch's default, which a proof cannot have
    with proving(tiny, CPU):
        assert not convolution.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    assert convolution.allow_tf32 == before
    with pytest.raises(KeyError), proving(tiny, CPU):
        raise KeyError
    assert convolution.allow_tf32 == before


def test_a_proof_on_the_cpu_moves_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To visit every layer of a small model takes as long as to run it."""
    monkeypatch.setattr(type(tiny), "to", lambda *_: pytest.fail("it is moved"))
    with proving(tiny, CPU):
        pass
    with pytest.raises(pytest.fail.Exception), proving(tiny, Placement(torch.device("meta"))):
        pass


@pytest.mark.parametrize(
    ("most", "pixels", "wanted"),
    [
        (32, 64 * 64, 32),
        (32, 512 * 512, 4),
        (2, 512 * 512, 2),
        (32, 1024 * 1024, 1),
        (16, 2**24, 1),
    ],
)
def test_large_pictures_are_fewer_at_once(most: int, pixels: int, wanted: int) -> None:
    assert pictures_at_once(most, pixels) == wanted


def test_the_vae_takes_large_pictures_one_by_one(tiny: Any) -> None:
    """And the latents are those of all at once."""
    sizes: list[int] = []
    tiny.vae.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    tiny.vae.decoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    pixels = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = tiny.moments(pixels)
    with torch.no_grad():
        wanted = tiny.vae.encode(pixels).latent_dist.parameters
        decoded = tiny.decode(moments[:, : tiny.latent_channels])
    assert sizes == [1, 1, 2, 1, 1]
    assert torch.allclose(moments, wanted, atol=1e-4)
    assert decoded.shape == pixels.shape
    tiny.moments(pixels[:, :, :64, :64])
    assert sizes[5:] == [2]  # small ones together, as ever
