"""Frames that read other frames: the sources against a loop and against a mask over all frames,
images untouched, no look ahead, a bank frame by frame, kernels that go with it or are refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from denoisers import traits_of
from torch import Tensor, nn

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext, use
from trainer.attention.host import Host
from trainer.attention.op import Traits
from trainer.attention.sites import Site, select
from trainer.kernels.column_masks import causal_mask
from trainer.kernels.softmax import eager
from trainer.ops.agent_attention import MergedAgents, PooledAgents
from trainer.ops.distillation import Distillation, Original
from trainer.ops.flashmask import FlashMask
from trainer.ops.gated_linear import GatedLinearOp
from trainer.ops.linear_attention import LinearAttentionOp
from trainer.ops.longlora import ShiftedSparse
from trainer.ops.temporal.frame_keys import FRAMES, FrameKeys, frames_read, gathered

Call = Callable[[nn.Module], Tensor]
READS = [("first",), ("previous",), ("first", "previous"), ("own", "first", "previous")]


def context(frames: int) -> StepContext:
    return StepContext(0, 1, torch.zeros(()), frames=frames)


def called(frames: int, site: Any = None) -> SiteCall:
    """Without a site, of one that says nothing but how its scores are scaled."""
    own: Any = SimpleNamespace(scale=None) if site is None else site
    return SiteCall(own, context(frames))


def heads(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("reads", READS, ids="+".join)
def test_it_is_what_a_loop_over_frames_gives(reads: tuple[str, ...]) -> None:
    q, k, v = heads(6, 2, 5, 3)  # two clips of three frames
    found = FrameKeys(reads, "test").kv(q, k, v, call=called(3))
    own = eager(*found)
    rows = []
    for clip in (0, 3):
        for i in range(3):
            at = [clip + FRAMES[name](i) for name in reads]
            keys, values = (torch.cat([x[j] for j in at], 1) for x in (k, v))
            scores = q[clip + i] @ keys.transpose(1, 2) / 3**0.5
            rows.append(scores.softmax(-1) @ values)
    wanted = torch.stack(rows)
    torch.testing.assert_close(own, wanted)
    reference = torch.autograd.grad(wanted.square().sum(), [q, k, v])
    for mine, other in zip(
        torch.autograd.grad(own.square().sum(), [q, k, v]), reference, strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_first_and_previous_are_a_mask_over_all_frames() -> None:
    frames, n = 4, 3
    q, k, v = heads(frames, 2, n, 5)
    own = eager(*FrameKeys(("first", "previous"), "test").kv(q, k, v, call=called(frames)))
    mask = torch.zeros(frames, frames, dtype=torch.bool)
    for name in ("first", "previous"):
        mask[torch.arange(frames), frames_read(frames, name)] = True
    whole = [x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v)]  # 1 h (f n) d
    every = mask.repeat_interleave(n, 0).repeat_interleave(n, 1)
    wanted = eager(*whole, every)[0].unflatten(1, (frames, n)).transpose(0, 1)
    torch.testing.assert_close(own[2:], wanted[2:])
    # the first two read frame 0 twice, which weighs as once
    torch.testing.assert_close(own[:2], wanted[:2])


def test_reading_itself_changes_nothing() -> None:
    k = heads(6, 2, 5, 3)[0]
    assert torch.equal(gathered(k, 3, ["own"]), k)


def test_an_image_stays_as_it_is(backbone: tuple[nn.Module, Call]) -> None:
    model, call = backbone
    base = call(model)
    host = Host.attach(model, traits_of(model))
    host.install(FrameKeys(("first", "previous"), "test"), select(host.sites, "self"))
    assert torch.equal(call(model), base)
    with use(StepContext(0, 1, torch.zeros(()), frames=2)):
        assert not torch.equal(call(model), base)


@pytest.mark.parametrize("reads", READS[:3], ids="+".join)
def test_no_frame_sees_a_later_one(reads: tuple[str, ...], tiny_unet: Any) -> None:
    host = Host.attach(tiny_unet)
    host.install(FrameKeys(reads, "test"), select(host.sites, "self"))
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    text = torch.randn(1, 5, 12).expand(4, -1, -1)
    other = torch.cat([x[:2], -x[2:]])
    with torch.no_grad(), use(StepContext(0, 1, torch.tensor(3), frames=4)):
        one, two = (tiny_unet(y, 3, encoder_hidden_states=text).sample for y in (x, other))
    torch.testing.assert_close(one[:2], two[:2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one[2:], two[2:], atol=1e-2)


class Bank:
    """Pix2Video as its paper runs it: one frame a forward, keys and values of the first and the
    last frame kept from theirs."""

    name = "bank"
    traits = Traits()

    def __init__(self) -> None:
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        kept = self.kept.setdefault(call.site.name, [])
        kept.append((k, v))
        before = kept[max(len(kept) - 2, 0)]
        return q, *(torch.cat([kept[0][i], before[i]], 2) for i in (0, 1))


def test_a_batch_of_all_frames_is_a_bank_of_them(tiny_unet: Any) -> None:
    host = Host.attach(tiny_unet)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    text = torch.randn(1, 5, 12)
    sites = select(host.sites, "self & up")
    bank = Bank()
    host.install(bank, sites)
    with torch.no_grad():
        one_by_one = [tiny_unet(y[None], 3, encoder_hidden_states=text).sample for y in x]
    host.remove(bank)
    host.install(FrameKeys(("first", "previous"), "test"), sites)
    with torch.no_grad(), use(StepContext(0, 1, torch.tensor(3), frames=4)):
        together = tiny_unet(x, 3, encoder_hidden_states=text.expand(4, -1, -1)).sample
    torch.testing.assert_close(together, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_half_a_clip_is_refused() -> None:
    q, k, v = heads(4, 1, 2, 3)
    with pytest.raises(ValueError, match=r"methods\.mine sees clips of 3 frames, and a batch of 4"):
        FrameKeys(("first",), "mine").kv(q, k, v, call=called(3))


KERNELS: dict[str, Callable[[Site], Any]] = {
    "agent_attention": lambda site: PooledAgents(site, 2),
    "agent_attention merged": lambda site: MergedAgents(),
    "gated_linear": lambda site: GatedLinearOp(site, ("row",)),
    "flashmask": lambda site: FlashMask(lambda n, f: causal_mask(n)),
    "longlora": lambda site: ShiftedSparse(0.25),
    "linear_attention": lambda site: LinearAttentionOp(site, "relu", shortcut=3),
}


@pytest.mark.parametrize("frames_first", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_of_one_key_a_query_is_refused(
    kernel: str, frames_first: bool, tiny_unet: Any
) -> None:
    host = Host.attach(tiny_unet)
    site = select(host.sites, "self")[0]
    ops = [FrameKeys(("first", "previous"), "tune_a_video"), KERNELS[kernel](site)]
    first, second = ops if frames_first else ops[::-1]
    host.install(first, [site])
    with pytest.raises(ValueError, match="further keys") as error:
        host.install(second, [site])
    for part in ("methods.tune_a_video", f"methods.{kernel.split()[0]}", site.name):
        assert part in str(error.value)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_frame_in_the_place_of_another_goes_with_every_kernel(
    kernel: str, tiny_unet: Any, run_unet: Call
) -> None:
    host = Host.attach(tiny_unet)
    sites = select(host.sites, "self")
    host.install(FrameKeys(("first",), "videop2p"), sites)
    for site in sites:
        host.install(KERNELS[kernel](site), [site])
    with use(StepContext(0, 1, torch.tensor(3), frames=2)):
        assert bool(run_unet(tiny_unet).isfinite().all())


def test_a_linear_kernel_sums_over_what_is_read(tiny_unet: Any) -> None:
    host = Host.attach(tiny_unet)
    site = select(host.sites, "self")[0]
    op = LinearAttentionOp(site, "relu")
    host.install(FrameKeys(("first", "previous"), "tune_a_video"), [site])
    host.install(op, [site])
    q, k, v = heads(3, site.heads, 4, site.head_dim)
    q, k, v = FrameKeys(("first", "previous"), "x").kv(q, k, v, call=called(3))
    phi_q, phi_k = q.relu(), k.relu()
    weights = phi_q @ phi_k.transpose(-2, -1)
    wanted = (weights / (weights.sum(-1, keepdim=True) + 1e-15)) @ v
    torch.testing.assert_close(op.kernel(q, k, v, mask=None, call=called(3, site)), wanted)


def test_a_distilled_site_learns_what_it_did_to_clips(tiny_unet: Any, run_unet: Call) -> None:
    """Nothing replaces its kernel here, so that there is nothing to learn, and the loss says so."""
    host = Host.attach(tiny_unet)
    site = select(host.sites, "self")[0]
    distillation = Distillation(1.0, 1.0)
    host.install(FrameKeys(("first", "previous"), "tune_a_video"), [site])
    host.install(Original(site, distillation), [site])
    tiny_unet.train()
    for frames in (1, 2):
        with use(StepContext(0, 1, torch.tensor(3), frames=frames, training=True)):
            run_unet(tiny_unet)
        assert len(distillation.terms) == 1
        assert float(distillation.loss(None).detach()) < 1e-10
