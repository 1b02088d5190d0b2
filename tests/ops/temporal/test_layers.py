"""Layers through time: what each computes, where it stands, images beside clips, checkpoints,
copies, adapters around what it stands after."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from denoisers import traits_of
from torch import Tensor, nn

from trainer.attention.anatomy import (
    attention_points,
    block_points,
    convolution_points,
    norm_groups,
    time_point,
)
from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext, use
from trainer.attention.denoiser_traits import UNDECLARED
from trainer.attention.host import Host
from trainer.attention.input_channels import ChannelConv
from trainer.attention.insert import insert
from trainer.attention.insertion import Item, insertions
from trainer.attention.op import Traits
from trainer.attention.sites import select
from trainer.backbones.held_layers import FP8
from trainer.backbones.layer_casting import cast_layers
from trainer.ops.temporal import layers
from trainer.ops.temporal.directed import Directed, DirectedAfter
from trainer.ops.temporal.layers import from_pixel_sequences, pixel_sequences
from trainer.ops.temporal.relative import RelativeBias, RelativeVectors

Call = Callable[[nn.Module], Tensor]
CLIP = StepContext(0, 1, torch.zeros(()), frames=2)


def layer(heads: int) -> Any:
    """What an op asks of a site, heads 4 wide."""
    return SimpleNamespace(heads=heads, head_dim=4, scale=None)


class Bare:
    """A denoiser as methods see it, with nothing around it."""

    denoiser_name = "net"

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser

    @property
    def host(self) -> Host:
        return Host.attach(self.denoiser, traits_of(self.denoiser))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.denoiser.named_parameters(prefix="net")


def attended(denoiser: nn.Module, stills: bool = False) -> list[str]:
    """Temporal attention after every attention block; nothing in it is zero."""
    model: Any = Bare(denoiser)
    torch.manual_seed(1)
    items = []
    for place in attention_points(denoiser):
        block = layers.TemporalAttention(place.width, 2, "test", "learned", 4)
        path = f"{place.parent}.temporal.{place.index}"
        items.append(Item(place.after, path, block, stills, checkpoint=not place.reruns))
    sites = insert(model, items, "test", True)
    for item in items:
        for parameter in item.block.parameters():
            nn.init.normal_(parameter, std=0.3)
    return sites


def test_lines_are_pixels_through_time() -> None:
    x = torch.randn(6, 5, 2, 3)  # two clips of three frames
    cut = pixel_sequences(x, 3)
    assert cut.shape == (12, 3, 5)
    for clip in range(2):
        for row in range(2):
            for column in range(3):
                wanted = x[3 * clip : 3 * clip + 3, :, row, column]
                assert torch.equal(cut[6 * clip + 3 * row + column], wanted)
    assert torch.equal(from_pixel_sequences(cut, x), x)
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(pixel_sequences(tokens, 3), cut)
    assert torch.equal(from_pixel_sequences(cut, tokens), tokens)


@pytest.mark.parametrize("grid", [True, False], ids=["grid", "tokens"])
def test_attention_is_what_a_loop_over_pixels_gives(grid: bool) -> None:
    torch.manual_seed(0)
    block = layers.TemporalAttention(6, 2, "test", "learned", 5).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 6, 2, 2) if grid else torch.randn(6, 4, 6)
    x = x.double()
    x.requires_grad_()
    own = block(x, x, StepContext(0, 1, torch.zeros(()), frames=3))
    attn: Any = block.attn
    rows = []
    for line in pixel_sequences(x, 3):
        z = F.layer_norm(line, (6,), block.norm.weight, block.norm.bias) + block.places.table[:3]
        heads = []
        for part in (slice(0, 3), slice(3, 6)):
            q, k, v = (z @ layer.weight[part].T for layer in (attn.to_q, attn.to_k, attn.to_v))
            heads.append((q @ k.T / 3**0.5).softmax(-1) @ v)
        rows.append(attn.to_out[0](torch.cat(heads, -1)))
    wanted = x + from_pixel_sequences(torch.stack(rows), x)
    torch.testing.assert_close(own, wanted)
    parameters = [x, *block.parameters()]
    found = torch.autograd.grad(own.square().sum(), parameters)
    reference = torch.autograd.grad(wanted.square().sum(), parameters)
    for mine, other in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, other)


def test_beside_a_module_it_reads_what_that_read() -> None:
    block = layers.TemporalAttention(4, 1, "test", parallel=True)
    nn.init.normal_(block.attn.to_out[0].weight)
    x, before = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    alone = layers.TemporalAttention(4, 1, "test")
    alone.load_state_dict(block.state_dict())
    torch.testing.assert_close(
        block(x, before, CLIP) - x, alone(before, before, CLIP) - before, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_is_one_whose_kernel_starts_as_a_dirac(size: int) -> None:
    torch.manual_seed(0)
    block = layers.TemporalConv(4, size)
    x = torch.randn(6, 4, 2, 3)
    ctx = StepContext(0, 1, torch.zeros(()), frames=3)
    assert torch.equal(block(x, x, ctx), x)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    dirac = nn.init.dirac_(torch.empty(4, 4, size))
    clips = x.unflatten(0, (2, 3)).transpose(1, 2)  # b c f h w
    kernel = (block.conv.weight + dirac)[..., None, None]
    wanted = F.conv3d(clips, kernel, block.conv.bias, padding=(size // 2, 0, 0))
    torch.testing.assert_close(block(x, x, ctx), wanted.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("grid", [True, False], ids=["grid", "tokens"])
def test_an_adaptor_scales_and_shifts_each_frame(grid: bool) -> None:
    torch.manual_seed(0)
    block = layers.FrameAdaptor(4, 3, "test")
    x = torch.randn(4, 4, 2, 3) if grid else torch.randn(4, 6, 4)
    assert torch.equal(block(x, x, CLIP), x)
    nn.init.normal_(block.scale)
    nn.init.normal_(block.shift)
    own = block(x, x, CLIP)
    for row in range(4):
        scale, shift = block.scale[row % 2], block.shift[row % 2]
        if grid:
            scale, shift = scale[:, None, None], shift[:, None, None]
        torch.testing.assert_close(own[row], (1 + scale) * x[row] + shift)


def test_relative_bias_is_by_signed_distance() -> None:
    op = RelativeBias(layer(2), 2, "vdm")
    assert 0.3 < float(RelativeBias(layer(8), 32, "vdm").table.detach().std()) < 3  # heads differ
    bias = op.bias(5)
    for head in range(2):
        for i in range(5):
            for j in range(5):
                assert bias[head, i, j] == op.table[head, max(-2, min(2, j - i)) + 2]


def test_relative_vectors_mask_and_leave_appended_keys_alone() -> None:
    torch.manual_seed(0)
    site = layer(2)
    op = RelativeVectors(site, 1, "vdm")
    q, (k, v) = torch.randn(1, 2, 3, 4), torch.randn(2, 1, 2, 4, 4)  # one key appended
    far = torch.tensor([[[1, 2, 2], [0, 1, 2], [0, 0, 1]]])[0]
    a, b = (F.pad(t[far], (0, 0, 0, 1)) for t in (op.keys, op.values))
    seen = torch.tensor([True, False, True, True])
    for mask in (None, seen, torch.randn(3, 4)):
        scores = ((q[:, :, :, None] * (k[:, :, None] + a)).sum(-1)) / 2
        if mask is not None:
            scores = scores.masked_fill(~seen, -torch.inf) if mask is seen else scores + mask
        wanted = (scores.softmax(-1)[..., None] * (v[:, :, None] + b)).sum(3)
        torch.testing.assert_close(op.kernel(q, k, v, mask=mask, call=SiteCall(site, CLIP)), wanted)


def test_masks_join_what_is_there() -> None:
    op = RelativeBias(layer(1), 3, "vdm")
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 3, 4)  # one key appended
    call = SiteCall(layer(1), CLIP)
    own = op.mask(None, q, k, call=call)
    assert own.shape == (1, 1, 2, 3)
    assert not own[..., 2].any()
    seen = torch.tensor([[[[True, False, True]]]])
    assert op.mask(seen, q, k, call=call)[..., 1].isneginf().all()
    assert torch.equal(op.mask(own, q, k, call=call), 2 * own)
    directed = Directed().mask(seen, q, k, call=call)
    assert directed.tolist() == [[[[True, False, True], [True, False, True]]]]
    added = Directed().mask(own, q, k, call=call)
    assert added[0, 0, 0, 1].isneginf() and added.isneginf().sum() == 1


def test_directed_attention_after_the_softmax_loses_what_later_frames_got() -> None:
    probs = torch.rand(1, 2, 3, 3).softmax(-1)
    call = SiteCall(layer(1), CLIP)
    assert torch.equal(DirectedAfter().probs(probs, call=call), probs.tril())


def test_learned_positions_start_small_and_apart() -> None:
    """A vector for each frame's number, added to it; 0.02 wide at first, as positions of GPT-2."""
    torch.manual_seed(0)
    places = layers.LearnedPositions(64, 50)
    assert 0.018 < float(places.table.detach().std()) < 0.022
    x = torch.randn(3, 5, 64)
    assert torch.equal(places(x), torch.stack([row + places.table[:5] for row in x]))


def test_frame_rate_joins_the_time_of_every_frame() -> None:
    torch.manual_seed(0)
    block = layers.FrameRate(6, default=8.0)
    x = torch.randn(4, 6)
    assert torch.equal(block(x, x, CLIP), x)
    nn.init.normal_(block.embedding.linear_2.weight)
    ctx = StepContext(0, 1, torch.zeros(()), frames=2, fps=torch.tensor([8.0, 24.0]))
    added = block(x, x, ctx) - x
    torch.testing.assert_close(added[0], added[1])
    torch.testing.assert_close(added[2], added[3])
    assert not torch.allclose(added[0], added[2])
    torch.testing.assert_close((block(x, x, CLIP) - x)[2], added[0])
    with pytest.raises(ValueError, match="3 frame rates for 2 clips"):
        block(x, x, StepContext(0, 1, torch.zeros(()), frames=2, fps=torch.ones(3)))


@pytest.mark.parametrize("held", [FP8, torch.bfloat16])
def test_layers_that_are_cast_get_their_inputs_unrounded(held: torch.dtype) -> None:
    """What is computed is that of the rounded weights."""
    torch.manual_seed(0)
    ctx = StepContext(0, 1, torch.zeros(()), frames=2, channels={"mask": torch.randn(4, 3, 5, 5)})
    rate = layers.FrameRate(6, default=7.3)
    mask = ChannelConv(nn.Conv2d(4, 6, 3, padding=1), "mask", 3)
    for block, shape in ((rate, (4, 6)), (mask, (4, 6, 5, 5))):
        for weight in block.requires_grad_(False).parameters():
            nn.init.normal_(weight)
        exact, x = copy.deepcopy(block), torch.randn(shape)
        assert cast_layers(block, held, ())
        for each in exact.modules():
            if isinstance(each, nn.Linear | nn.Conv2d):
                each.weight.data = each.weight.data.to(held).float()
        torch.testing.assert_close(block(x, x, ctx), exact(x, x, ctx))


def test_inserted_attention_is_a_site_in_time(backbone: tuple[nn.Module, Call]) -> None:
    model, call = backbone
    spatial = {site.name for site in Host.attach(model).sites}
    inside = attended(model)
    sites = Host.attach(model).sites
    assert {site.name for site in sites} == spatial | set(inside)
    assert {site.name for site in select(sites, "temporal")} == set(inside)
    for selector in ("all", "self", "cross", "!cross", "all | !mid | /1 | /2"):
        assert not {site.name for site in select(sites, selector)} & set(inside)
    order: list[str] = []
    for site in sites:
        site.module.register_forward_pre_hook(lambda *_, name=site.name: order.append(name))
    with torch.no_grad(), use(CLIP):
        call(model)
    assert order == [site.name for site in sites]
    names = {f"net.{site}.to_q.weight" for site in inside}
    assert names <= dict(Bare(model).named_parameters()).keys()


def test_images_pass_by_and_leave_gradients_of_zero(backbone: tuple[nn.Module, Call]) -> None:
    model, call = backbone
    base = call(model).detach()
    attended(model)
    image = call(model)
    assert torch.equal(image, base)
    image.square().sum().backward()
    inside = [p for found in insertions(model) for p in found.block.parameters()]
    assert inside and all(p.grad is not None and not p.grad.any() for p in inside)
    with use(CLIP):
        clip = call(model)
    assert not torch.allclose(clip, base, atol=1e-4)


def test_stills_may_be_asked_for(tiny_unet: nn.Module, run_unet: Call) -> None:
    base = run_unet(tiny_unet).detach()
    attended(tiny_unet, stills=True)
    assert not torch.allclose(run_unet(tiny_unet), base, atol=1e-4)


def test_clips_of_one_batch_do_not_mix(tiny_unet: nn.Module) -> None:
    attended(tiny_unet)
    model: Any = tiny_unet
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 12)
    with torch.no_grad(), use(CLIP):
        together = model(x, 7, text).sample
        apart = [model(x[i : i + 2], 7, text[i : i + 2]).sample for i in (0, 2)]
        changed = model(torch.cat([x[:3], -x[3:]]), 7, text).sample
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(changed[:2], together[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed[2], together[2], atol=1e-3)


def test_a_batch_that_is_no_whole_clips_is_refused(tiny_unet: nn.Module, run_unet: Call) -> None:
    attended(tiny_unet)
    with (
        use(StepContext(0, 1, torch.zeros(()), frames=3)),
        pytest.raises(ValueError, match=r"methods\.test sees clips of 3 frames, and a batch of 2"),
    ):
        run_unet(tiny_unet)


def test_checkpointed_gradients_are_equal_and_of_their_own_frames(
    backbone: tuple[nn.Module, Call], gradients: Callable[[nn.Module, Tensor], dict[str, Tensor]]
) -> None:
    model: Any
    model, call = backbone
    attended(model)
    model.train()

    def step() -> dict[str, Tensor]:
        torch.manual_seed(0)  # a DiT drops labels in training
        with use(CLIP):
            output = call(model)
        with torch.no_grad():
            call(model)  # images between forward and backward
        return gradients(model, output)

    expected = step()
    model.enable_gradient_checkpointing()
    runs: list[int] = []
    for found in insertions(model):
        found.block.register_forward_pre_hook(lambda *_: runs.append(1))
    actual = step()
    assert len(runs) == 2 * len(insertions(model))
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-5, atol=1e-6)


def test_a_copy_is_its_own(tiny_unet: nn.Module, run_unet: Call) -> None:
    attended(tiny_unet)
    copied = copy.deepcopy(tiny_unet)
    with torch.no_grad(), use(CLIP):
        clip = run_unet(tiny_unet)
        assert torch.equal(run_unet(copied), clip)
        for found in insertions(copied):
            for parameter in found.block.parameters():
                parameter.zero_()
        assert torch.equal(run_unet(tiny_unet), clip)
        assert not torch.equal(run_unet(copied), clip)
    holders = {id(found.holder) for found in insertions(copied)}
    assert holders == {id(Host.attach(copied).holder)} != {id(Host.attach(tiny_unet).holder)}


def test_without_a_host_all_are_images(tiny_unet: nn.Module, run_unet: Call) -> None:
    base = run_unet(tiny_unet)
    attended(tiny_unet)
    with use(CLIP):
        clip = run_unet(tiny_unet)
        Host.attach(tiny_unet).detach()
        assert torch.equal(run_unet(tiny_unet), base)
        Host.attach(tiny_unet)
        assert torch.equal(run_unet(tiny_unet), clip)


def test_compiled_it_is_the_same(tiny_unet: nn.Module, run_unet: Call) -> None:
    attended(tiny_unet)
    with torch.no_grad():
        image = run_unet(tiny_unet)
        with use(CLIP):
            clip = run_unet(tiny_unet)
        model: Any = tiny_unet
        model.down_blocks[0].compile(backend="eager")
        for _ in range(2):
            torch.testing.assert_close(run_unet(tiny_unet), image)
            with use(CLIP):
                torch.testing.assert_close(run_unet(tiny_unet), clip)


class Probe:
    name = "probe"
    traits = Traits()

    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []

    def output(self, o: Tensor, call: SiteCall) -> Tensor:
        self.grids.append(call.grid(o.shape[2], "test"))
        return o


def test_an_op_in_time_may_miss_images_and_no_clip(tiny_unet: nn.Module, run_unet: Call) -> None:
    attended(tiny_unet)
    host, probe = Host.attach(tiny_unet), Probe()
    host.install(probe, select(host.sites, "temporal"))
    run_unet(tiny_unet)
    assert not probe.grids
    with use(CLIP):
        run_unet(tiny_unet)
    assert set(probe.grids) == {(1, 2)}
    for found in insertions(tiny_unet):
        found.handle.remove()
    Host.attach(tiny_unet)
    with use(CLIP), pytest.raises(RuntimeError, match="never reached"):
        run_unet(tiny_unet)


def test_a_model_of_clips_is_refused() -> None:
    from diffusers import UNetMotionModel

    model = UNetMotionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16,),
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
        cross_attention_dim=12,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    bare: Any = Bare(model)
    item = Item("down_blocks.0.attentions.0", "down_blocks.0.motion_modules.0", nn.Identity())
    with pytest.raises(ValueError, match=r"has down_blocks\.0\.motion_modules\.0 already"):
        insert(bare, [item], "test", True)


def test_places_of_a_unet(tiny_unet: nn.Module) -> None:
    pairs = [(p.after, p.width, p.divisor) for p in block_points(tiny_unet)]
    assert pairs == [
        ("down_blocks.0.attentions.0", 16, 1),
        ("down_blocks.1.attentions.0", 32, 2),
        ("mid_block.attentions.0", 32, 2),
        ("up_blocks.0.attentions.0", 32, 2),
        ("up_blocks.0.attentions.1", 32, 2),
        ("up_blocks.1.attentions.0", 16, 1),
        ("up_blocks.1.attentions.1", 16, 1),
    ]
    assert len(convolution_points(tiny_unet)) == 2 * 8
    assert time_point(tiny_unet, traits_of(tiny_unet)).width == 64
    assert norm_groups(tiny_unet, 16) == 4


def test_blocks_without_attention_are_places_after_their_resnets() -> None:
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(16,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type="UNetMidBlock2D",
    )
    names = [place.after for place in block_points(model)]
    assert names[:3] == [
        "down_blocks.0.resnets.0",
        "down_blocks.0.resnets.1",
        "mid_block.resnets.0",
    ]
    with pytest.raises(ValueError, match="no attention to put temporal attention after"):
        attention_points(model)


def test_a_denoiser_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear is neither a U-Net nor a transformer"):
        block_points(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear declares no timestep embedding"):
        time_point(nn.Linear(2, 2), UNDECLARED)
