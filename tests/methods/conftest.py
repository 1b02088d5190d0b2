"""What the tests of single methods share: a prediction to compare, weights as if trained, a stored
adapter, peft's own model beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.attention.op import Traits
from trainer.methods.apply import Plan
from trainer.runs.adapter import save_adapter


class AppendKey:
    """An op that appends the first key and its value once more."""

    name = "append"
    traits = Traits()

    def kv(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q, torch.cat([k, k[:, :, :1]], 2), torch.cat([v, v[:, :, :1]], 2)


@pytest.fixture
def append_key() -> AppendKey:
    return AppendKey()


@pytest.fixture(scope="session")
def predict() -> Callable[[Any], Tensor]:
    """The output of a backbone for two prompts, one of them empty, in the backbone's own dtype."""

    def run(backbone: Any) -> Tensor:
        x_t = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
        x_t = x_t.to(next(backbone.denoiser.parameters()).dtype)
        condition = backbone.encode_prompts(["a fox on a red background", ""])
        output: Tensor = backbone.predict(x_t, torch.tensor([3, 900]), condition)
        return output

    return run


@pytest.fixture(scope="session")
def looped_block() -> Callable[..., Tensor]:
    """`looped_block(block, x, text, reads)`: a transformer block of a U-Net frame by frame, x (f,
    n, c), text (f, m, d): self-attention of frame i over the tokens of the frames `reads[i]`, then
    attention to the text, then the feed-forward layer."""

    def attend(attn: Any, z: Tensor, context: Tensor) -> Tensor:
        out = []
        q, k, v = attn.to_q(z), attn.to_k(context), attn.to_v(context)
        for own, keys, values in zip(*(t.chunk(attn.heads, -1) for t in (q, k, v)), strict=True):
            scores = own @ keys.T / own.shape[-1] ** 0.5
            out.append(scores.softmax(-1) @ values)
        found: Tensor = attn.to_out[0](torch.cat(out, -1))
        return found

    def run(block: Any, x: Tensor, text: Tensor, reads: Sequence[Sequence[int]]) -> Tensor:
        normed, rows = [block.norm1(row) for row in x], []
        for i, sources in enumerate(reads):
            context = torch.cat([normed[frame] for frame in sources])
            y = x[i] + attend(block.attn1, normed[i], context)
            y = y + attend(block.attn2, block.norm2(y), text[i])
            rows.append(y + block.ff(block.norm3(y)))
        return torch.stack(rows)

    return run


@pytest.fixture(scope="session")
def randomise() -> Callable[..., None]:
    """`randomise(backbone, plan, spread=0.1)`: as after training, nothing that trains is zero."""

    def run(backbone: Any, plan: Plan, spread: float = 0.1) -> None:
        generator = torch.Generator().manual_seed(0)
        parameters = dict(backbone.named_parameters())
        with torch.no_grad():
            for name in plan.names:
                shape = parameters[name].shape
                parameters[name].add_(spread * torch.randn(shape, generator=generator))

    return run


@pytest.fixture(scope="session")
def save() -> Callable[..., dict[str, Tensor]]:
    """`save(path, backbone, plan, tree)` stores an adapter and returns its tensors. tree: of the
    recipe, where it is to be loaded again."""

    def run(
        path: Path, backbone: Any, plan: Plan, tree: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        own = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
        stored = {name: own[name].detach().clone() for name in plan.stored}
        header = dict(tree or {"backbone": "x", "methods": {}})
        save_adapter(path, stored, header, backbone.identity())
        return stored

    return run


@pytest.fixture(scope="session")
def same_as_peft(predict: Callable[[Any], Tensor]) -> Callable[..., None]:
    """`same_as_peft(backbone, plan, name, plain, config)`: the adapter called `name` does what
    `get_peft_model` with that configuration does on a plain copy: output and gradients, in fp64,
    where sums in another order differ by less than a wrong term could."""

    def check(backbone: Any, plan: Plan, name: str, plain: Any, config: Any) -> None:
        from peft import get_peft_model

        backbone.double()
        plain.double()
        plain.unet = get_peft_model(plain.unet, config).double()
        others = {
            key.replace("base_model.model.", "").replace(".default.", f".{name}."): parameter
            for key, parameter in plain.named_parameters()
            if parameter.requires_grad and "lora_" in key
        }
        assert set(others) == set(plan.names)
        parameters = dict(backbone.named_parameters())
        with torch.no_grad():
            for key, parameter in others.items():
                parameter.copy_(parameters[key])
        own, wanted = predict(backbone), predict(plain)
        same(own, wanted, "output")
        own.square().sum().backward()
        wanted.square().sum().backward()
        for key, parameter in others.items():
            assert parameter.grad is not None
            same(parameters[key].grad, parameter.grad, key)

    def same(own: Tensor, wanted: Tensor, what: str) -> None:
        assert float((own - wanted).detach().abs().max()) <= 1e-10 * float(wanted.abs().max()), what

    return check
