"""AnimateDiff: diffusers' own motion U-Net on the same weights, its MotionAdapter's parameters, the
paper's three stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import traits_of
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.attention.context import StepContext, use
from trainer.attention.host import Host
from trainer.backbones.four_bits import is_packed
from trainer.config.header import file_of
from trainer.config.load import load_recipe, methods_of
from trainer.config.schema import RecipeError
from trainer.data.world.clips import DIRECTIONS, OPPOSITE, draw_clip
from trainer.data.world.sprites import KNOWN
from trainer.diffusion.objective import add_noise, target_of
from trainer.media.images import to_tensor
from trainer.methods.apply import apply_methods
from trainer.methods.feature.animatediff import AnimateDiff
from trainer.ops.temporal.motion_names import theirs
from trainer.ops.temporal.weights import NORM
from trainer.runs.adapter import load_adapted
from trainer.training.build import objective
from trainer.training.fit import fit


class Bare:
    """A denoiser as methods see it, with nothing around it."""

    denoiser_name = "unet"

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser

    @property
    def host(self) -> Host:
        return Host.attach(self.denoiser, traits_of(self.denoiser))

    @property
    def sites(self) -> Any:
        return self.host.sites

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.denoiser.named_parameters(prefix="unet")


def motion_adapter(backbone: Any, heads: int = 2) -> Any:
    """diffusers' container with our weights, found by name; every name of one is one of the
    other's."""
    from diffusers import MotionAdapter

    config = backbone.unet.config
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_num_attention_heads=heads,
        motion_norm_num_groups=config.norm_num_groups,
    )
    state = {k: v for k, v in backbone.unet.state_dict().items() if "motion_modules" in k}
    adapter.load_state_dict(state)
    return adapter


def predict(backbone: Any, frames: int) -> Tensor:
    """Four rows: two clips of two frames, one of four, or four images."""
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    condition = backbone.encode_prompts(["a fox moving left", "a fox", "a cat", ""])
    t = torch.tensor(300)
    with torch.no_grad(), use(StepContext(0, 1, t, frames)):
        output: Tensor = backbone.predict(x_t, t.expand(4), condition)
    return output


def test_it_computes_what_diffusers_motion_unet_does(
    tiny: Any, open_folder: Callable[[Path], Any], tiny_folder: Path, randomise: Any
) -> None:
    from diffusers import UNetMotionModel

    plain = open_folder(tiny_folder)
    plan = apply_methods(tiny, {"animatediff": AnimateDiff(heads=2)})
    randomise(tiny, plan, 0.2)
    reference: Any = UNetMotionModel.from_unet2d(plain.unet, motion_adapter(tiny)).eval()
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    text = tiny.encode_prompts(["a fox moving left", "a fox", "a cat", ""])
    for frames in (2, 4):
        clips = x_t.unflatten(0, (-1, frames)).transpose(1, 2)  # b c f h w
        with torch.no_grad():
            wanted = reference(clips, 300, text.tokens).sample
        own = predict(tiny, frames)
        torch.testing.assert_close(own, wanted.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(own, predict(plain, frames), atol=1e-2)
    assert torch.equal(predict(tiny, 1), predict(plain, 1))


def test_each_frame_is_normalised_by_itself_as_in_the_released_code(
    tiny: Any, open_folder: Callable[[Path], Any], tiny_folder: Path, randomise: Any
) -> None:
    """The reference is diffusers' motion U-Net whose norm is called once a frame."""
    from diffusers import UNetMotionModel
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    plain = open_folder(tiny_folder)
    plan = apply_methods(tiny, {"animatediff": AnimateDiff(heads=2, norm="frame")})
    randomise(tiny, plan, 0.2)
    reference: Any = UNetMotionModel.from_unet2d(plain.unet, motion_adapter(tiny)).eval()
    for module in reference.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            own = module.norm.forward
            module.norm.forward = lambda x, own=own: torch.stack(
                [own(x[:, :, i]) for i in range(x.shape[2])], 2
            )
    x_t = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    text = tiny.encode_prompts(["a fox moving left", "a fox", "a cat", ""])
    clips = x_t.unflatten(0, (-1, 4)).transpose(1, 2)  # b c f h w
    with torch.no_grad():
        wanted = reference(clips, 300, text.tokens).sample
    own = predict(tiny, 4)
    torch.testing.assert_close(own, wanted.transpose(1, 2).flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_weights_are_normalised_as_they_were_trained(
    tiny: Any, tmp_path: Path, save_trained_on: Callable[..., Path], tiny_folder: Path
) -> None:
    """Unless the recipe says otherwise: a file with the released code's names each frame, an
    adapter as its recipe, or that of the modules it went on from, says."""
    from safetensors.torch import save_file

    apply_methods(tiny, {"animatediff": AnimateDiff(heads=2)})
    motion_adapter(tiny).save_pretrained(tmp_path / "folder")
    state = {k: v for k, v in tiny.unet.state_dict().items() if "motion_modules" in k}
    released = {other: v.clone() for k, v in state.items() for other in theirs(k)}
    save_file(released, tmp_path / "released.safetensors")
    save_file(released, tmp_path / "ours.safetensors", {NORM: "clip"})
    framed = save_trained_on(tiny_folder, {"animatediff": {"heads": 2, "norm": "frame"}}, "framed")
    further = save_trained_on(
        tiny_folder, {"animatediff": {"heads": 2, "weights": str(framed)}}, "further"
    )
    together = save_trained_on(tiny_folder, {"animatediff": {"heads": 2}}, "together")
    for where, norm, wanted in (
        (None, None, False), (None, "frame", True),
        (tmp_path / "folder", None, False), (tmp_path / "folder", "frame", True),
        (tmp_path / "released.safetensors", None, True),
        (tmp_path / "released.safetensors", "clip", False),
        (tmp_path / "ours.safetensors", None, False),
        (framed, None, True), (further, None, True), (together, None, False),
    ):  # fmt: skip
        method = AnimateDiff(heads=2, norm=norm, weights=where and str(where))
        assert method._per_frame() is wanted, (where, norm)


SD15: dict[str, Any] = {"cross_attention_dim": 768, "sample_size": 64}


@pytest.mark.parametrize("mid", [True, False], ids=["v2", "v1"])
def test_on_sd15_it_has_the_parameters_of_diffusers_motion_adapter(mid: bool) -> None:
    from diffusers import MotionAdapter, UNet2DConditionModel

    with torch.device("meta"):
        model: Any = Bare(UNet2DConditionModel(**SD15))
        wanted = MotionAdapter(use_motion_mid_block=mid)
        edit = AnimateDiff(mid=mid).apply(model)
    own = {
        name.removeprefix("unet."): value.shape
        for name, value in model.named_parameters()
        if name in edit.trains
    }
    assert own == {name: value.shape for name, value in wanted.named_parameters()}
    count = sum(shape.numel() for shape in own.values())
    places = sum(32 * value.shape[-1] for name, value in wanted.named_buffers())
    # 453.8 M and 417.7 M with the sines, which are counted where a file's values are
    assert count == (453_209_280 if mid else 417_137_600)
    assert count + places == (453_813_440 if mid else 417_700_800)
    assert len(edit.sites) == 2 * (8 + 12 + mid)


def test_a_transformer_has_a_module_after_every_block(dit: Any, randomise: Any) -> None:
    base = predict(dit, 2)
    plan = apply_methods(dit, {"animatediff": AnimateDiff(heads=2)})
    assert torch.equal(predict(dit, 2), base)
    randomise(dit, plan, 0.2)
    blocks = dit.transformer.transformer_blocks
    assert [len(block.motion_modules) for block in blocks] == [1, 1]
    assert not torch.allclose(predict(dit, 2), base, atol=1e-2)
    assert torch.equal(predict(dit, 1), base)


def test_a_clip_longer_than_its_places_is_refused(tiny: Any) -> None:
    apply_methods(tiny, {"animatediff": AnimateDiff(heads=2, max_frames=3)})
    with pytest.raises(
        ValueError, match=r"methods\.animatediff has positions for 3 frames, and this"
    ):
        predict(tiny, 4)


def test_heads_that_do_not_divide_are_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"methods\.animatediff: heads=3 does not divide 16"):
        apply_methods(tiny, {"animatediff": AnimateDiff(heads=3)})


def test_layers_that_neither_train_nor_are_read_are_refused() -> None:
    with pytest.raises(RecipeError, match="train=false without weights leaves layers that add"):
        methods_of({"animatediff": {"train": False}})


def test_motion_lora_trains_over_a_motion_adapter_in_4_bits(
    tiny: Any,
    open_folder: Callable[[Path], Any],
    tiny_folder: Path,
    tmp_path: Path,
    randomise: Any,
    train: Callable[..., list[float]],
) -> None:
    """The paper's last stage: the modules frozen, LoRA on their attention, read from the folder
    that diffusers writes."""
    source = open_folder(tiny_folder)
    randomise(source, apply_methods(source, {"animatediff": AnimateDiff(heads=2)}), 0.2)
    motion_adapter(source).save_pretrained(tmp_path)
    tree = {
        "animatediff": {"heads": 2, "train": False, "weights": str(tmp_path)},
        "lora": {"sites": "temporal", "rank": 2, "layers": ["*motion_modules.?.proj_in"]},
    }
    plan = apply_methods(tiny, methods_of(tree))
    assert torch.equal(predict(tiny, 2), predict(source, 2))
    assert all("motion_modules" in name and ".lora." in name for name in plan.names)
    assert len(plan.names) == 2 * (4 * 14 + 7)
    before = {name: value.detach().clone() for name, value in tiny.named_parameters()}
    train(tiny, plan, frames=2)
    after = dict(tiny.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(
        plan.names
    )
    packed = open_folder(tiny_folder)
    wide = {**tree["lora"], "layers": ["*motion_modules.?.*ff.net.2"]}  # rows of whole blocks
    apply_methods(packed, methods_of(tree | {"nf4": {"min_size": 256}, "lora": wide}))
    layer = packed.unet.mid_block.motion_modules[0].transformer_blocks[0].ff.net[2].base_layer
    assert is_packed(layer)
    still = open_folder(tiny_folder)
    apply_methods(still, methods_of({"nf4": {"min_size": 256}, "lora": {"sites": "self"}}))
    moved = (predict(packed, 2) - predict(still, 2)).flatten()
    wanted = (predict(source, 2) - predict(open_folder(tiny_folder), 2)).flatten()
    assert float(torch.cosine_similarity(moved, wanted, 0)) > 0.8  # what the modules do, rounded


def test_weights_that_do_not_fit_are_refused(
    tiny: Any, open_folder: Callable[[Path], Any], tiny_folder: Path, tmp_path: Path
) -> None:
    apply_methods(tiny, {"animatediff": AnimateDiff(heads=2)})
    motion_adapter(tiny).save_pretrained(tmp_path)
    unet = "down_blocks.0.motion_modules.0.norm.weight"
    for options, says in (
        ({"weights": str(tmp_path), "mid": False}, r"weights=.*: it holds mid_block\.motion_mod"),
        ({"weights": str(tmp_path / "none")}, "no such file, nor a folder with adapter"),
        ({"weights": __file__}, "not a safetensors file"),
    ):
        with pytest.raises(ValueError, match=rf"methods\.animatediff: .*{says}"):
            apply_methods(
                open_folder(tiny_folder), {"animatediff": AnimateDiff(heads=2, **options)}
            )
    from safetensors.torch import load_file, save_file

    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {unet: torch.zeros(3)}, tmp_path / "wide.safetensors")
    del tensors[unet]
    save_file(tensors, tmp_path / "short.safetensors")
    for name, says in (("wide", r"norm\.weight is \(3,\) there"), ("short", r"it lacks .*, 1 ten")):
        where = str(tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=says):
            apply_methods(
                open_folder(tiny_folder), {"animatediff": AnimateDiff(heads=2, weights=where)}
            )


def test_the_shipped_modules_know_the_words_of_motion() -> None:
    """Almost noise is denoised better by a clip's own caption than by that of the opposite way, in
    the frames in which the two differ."""
    shipped = file_of("tiny_motion")
    assert shipped.stat().st_size <= 6e6
    model, _ = load_adapted(shipped)
    ways = list(DIRECTIONS)
    clips = [draw_clip(77, i, KNOWN, frames=8, motion=ways[i % 4]) for i in range(16)]
    frames = torch.stack([to_tensor(Image.fromarray(f)) for clip in clips for f in clip.frames])
    moments = model.moments(frames)
    x0 = model.latents(moments, torch.zeros_like(moments.chunk(2, 1)[0]))
    told = [
        [clip.caption.replace(way, to[way]) for clip, way in zip(clips, ways * 4, strict=True)]
        for to in (dict(zip(ways, ways, strict=True)), OPPOSITE)
    ]
    path = objective(load_recipe(["recipe=animatediff"]), model)
    t = torch.full((len(x0),), 960)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    x_t, target = add_noise(path, x0, noise, t), target_of(path, x0, noise, t)
    losses = []
    for captions in told:
        condition = model.encode_prompts(captions).per_frame(8)
        with torch.no_grad(), use(StepContext(0, 1, t, 8)):
            error = (model.predict(x_t, t, condition) - target).square()
        losses.append(error.flatten(1).mean(1).view(-1, 8).mean(0))
    gap = losses[1] - losses[0]
    print(f"opposite less own caption, by frame: {[round(x, 4) for x in gap.tolist()]}")
    assert float(gap[[0, 1, 6, 7]].min()) > 0.005


def test_a_run_begins_with_the_shipped_words_and_leaves_them(tmp_path: Path) -> None:
    words = ["recipe=animatediff", "data.count=4", "data.validation=0", "run.steps=2"]
    words += ["run.batch_size=2", "run.validate_every=0", "preview.every=0", "tracker=none"]
    run = fit(load_recipe([*words, f"run.out={tmp_path}", "run.id=x", "optim.ema=null"]))
    before = load_file(file_of("tiny_words"))
    after = load_file(file_of(run))
    assert all(torch.equal(value.float(), after[name]) for name, value in before.items())
    trained = set(after) - set(before)
    assert trained and all("motion_modules" in name for name in trained)
