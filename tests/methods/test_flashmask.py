"""FlashMask as a method: the mask of its options at every site, and what it cannot mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.call import SiteCall
from trainer.attention.context import StepContext
from trainer.attention.op import Traits
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
from trainer.kernels.block_masks import radial
from trainer.kernels.block_sparse import block_sparse
from trainer.kernels.softmax import eager
from trainer.methods.apply import apply_methods
from trainer.methods.function.flashmask import Flashmask
from trainer.methods.weight.lora import Lora


def sees(method: Flashmask, tokens: int, frames: int = 1) -> Tensor:
    return method.spec(tokens, frames).dense()[0, 0]


def test_sizes_are_shares_or_numbers() -> None:
    i, j = torch.arange(16)[:, None], torch.arange(16)
    assert torch.equal(sees(Flashmask(size=0.25), 16), (i - j).abs() <= 4)
    assert torch.equal(sees(Flashmask(size=3), 16), (i - j).abs() <= 3)
    assert sees(Flashmask(size=1), 16).all()
    assert torch.equal(sees(Flashmask(mask="windows", size=0.25), 16), i // 4 == j // 4)
    assert torch.equal(sees(Flashmask(mask="causal"), 16), j <= i)
    seen = sees(Flashmask(size=3, seen=2), 16)
    assert seen[:2].all() and seen[:, :2].all() and not seen[2, 6:].any()


def test_frames_of_a_clip_see_the_first_and_the_one_before() -> None:
    table = sees(Flashmask(mask="frames"), 12, 4)
    frame = torch.arange(12) // 3
    wanted = (frame == 0) | (frame == (frame - 1).clamp(min=0)[:, None])
    assert torch.equal(table, wanted)
    causal = sees(Flashmask(mask="causal_frames"), 12, 4)
    assert torch.equal(causal, frame <= frame[:, None])


def test_frames_that_do_not_divide_the_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="13 tokens are no multiple of 4 frames"):
        Flashmask(mask="frames").spec(13, 4)


@pytest.mark.parametrize("backend", ["auto", "blockwise", "dense"])
def test_sites_attend_under_the_mask(
    backend: Any, tiny: Any, predict: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against eager kernels under the mask written out."""
    method = Flashmask(size=0.25, backend=backend)
    base = predict(tiny)
    apply_methods(tiny, {"flashmask": method, "lora": Lora()})
    own = predict(tiny)
    assert not torch.allclose(own, base, atol=1e-3)
    (op,) = {op for p in tiny.host.processors.values() for op in p.ops}

    def reference(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return eager(q, k, v, sees(method, q.shape[2]))

    monkeypatch.setattr(type(op), "kernel", lambda self, *args, **_: reference(*args))
    torch.testing.assert_close(own, predict(tiny), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("added", [False, True])
def test_another_methods_mask_holds_too(
    added: bool, tiny: Any, predict: Callable[[Any], Tensor]
) -> None:
    class Itself:
        name = "itself"
        traits = Traits()

        def mask(self, mask: Any, q: Tensor, k: Tensor, **_: Any) -> Tensor:
            allowed = torch.eye(q.shape[2], dtype=torch.bool)
            return (
                torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf) if added else allowed
            )

    sites = [site for site in tiny.sites if site.kind == "self"]
    tiny.host.install(Itself(), sites)
    alone = predict(tiny)
    apply_methods(tiny, {"flashmask": Flashmask(size=0.25), "lora": Lora()})
    torch.testing.assert_close(predict(tiny), alone)


def test_cross_attention_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError) as error:
        apply_methods(tiny, {"flashmask": Flashmask(sites="all"), "lora": Lora()})
    assert str(error.value).startswith("methods.flashmask: ")
    assert "is cross-attention" in str(error.value)


def test_keys_appended_by_another_op_are_refused(
    tiny: Any, predict: Callable[[Any], Tensor], append_key: Any
) -> None:
    apply_methods(tiny, {"flashmask": Flashmask(), "lora": Lora()})
    tiny.host.install(append_key, [site for site in tiny.sites if site.kind == "self"])
    with pytest.raises(ValueError, match=r"methods\.flashmask needs the tokens of .* keys for"):
        predict(tiny)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "methods.flashmask.size=0"),
        ({"size": 2.5}, "give a share of at most 1, or a whole number of tokens"),
        ({"mask": "windows", "seen": 4}, "seen=4 belongs to mask=sliding_window"),
        ({"mask": "sliding_windo"}, "did you mean sliding_window?"),
    ],
)
def test_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"flashmask": options})
    assert message in str(error.value)


@pytest.mark.parametrize("mask", ["sliding_tiles", "circle"])
def test_sites_attend_under_a_mask_by_blocks(
    mask: Any, tiny: Any, predict: Callable[[Any], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against eager kernels under the mask written out, of both axes of the grid."""
    method = Flashmask(mask=mask, tile=2, reach=0, size=2)
    apply_methods(tiny, {"flashmask": method, "lora": Lora()})
    own = predict(tiny)

    def reference(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        side = round(q.shape[2] ** 0.5)
        y, x = torch.arange(side * side) // side, torch.arange(side * side) % side
        down, across = y[:, None] - y, x[:, None] - x
        near = down.square() + across.square() <= 4
        if mask == "sliding_tiles":
            near = (y[:, None] // 2 == y // 2) & (x[:, None] // 2 == x // 2)
        return eager(q, k, v, near)

    (op,) = {op for p in tiny.host.processors.values() for op in p.ops}
    monkeypatch.setattr(type(op), "kernel", lambda self, *args, **_: reference(*args))
    torch.testing.assert_close(own, predict(tiny), rtol=1e-4, atol=1e-4)


def test_frames_of_a_clip_attend_radially(dit: Any) -> None:
    """Where a model has all frames in one sequence, the site alone; pictures are refused."""
    apply_methods(dit, {"flashmask": Flashmask(mask="radial", size=3), "lora": Lora()})
    site = next(site for site in dit.sites if site.kind == "self")
    (op,) = dit.host.processors[site.name].ops
    q, k, v = torch.randn(3, 1, 2, 24, 4, generator=torch.Generator().manual_seed(0))
    call = SiteCall(site, StepContext(0, 1, torch.tensor(0), frames=4))
    own = op.kernel(q, k, v, mask=None, call=call)
    mask = radial(4, 6, 3, size=6)
    wanted = block_sparse(q, k, v, mask.chosen, call.scale)
    torch.testing.assert_close(own, wanted)
    still = SiteCall(site, StepContext(0, 1, torch.tensor(0)))
    refused = r"methods\.flashmask: mask=radial needs the tokens of all"
    with pytest.raises(ValueError, match=refused):
        op.kernel(q, k, v, mask=None, call=still)


def test_a_window_of_everything_is_attention(tiny: Any, predict: Callable[[Any], Tensor]) -> None:
    base = predict(tiny)
    method = Flashmask(mask="sliding_tiles", reach=8)
    apply_methods(tiny, {"flashmask": method, "lora": Lora()})
    assert torch.equal(predict(tiny), base)
