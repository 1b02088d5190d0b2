"""FlashMask as a method: the mask of its options at every site, and what it cannot mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.config.load import methods_of
from trainer.config.schema import RecipeError
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
        ({"mask": "sliding"}, "did you mean sliding_window?"),
    ],
)
def test_refused_before_loading(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods_of({"flashmask": options})
    assert message in str(error.value)
