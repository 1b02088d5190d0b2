"""What a training step adds up, through a real one: every row's squared error under its mask, class
images by their weight, and the methods' own terms, each against its formula written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trainer.config.load import load_recipe
from trainer.data.loader import Batch, Planned
from trainer.methods.apply import Plan, apply_methods
from trainer.training.build import module_of, needs, step_plan

PRIOR_WEIGHT = 0.3
WORDS = [
    "recipe=custom_diffusion", "methods.new_token=null", "run.batch_size=4", "run.workers=0",
    "data.class_word=dog", f"data.prior_weight={PRIOR_WEIGHT}", "data.augment=true",
]  # fmt: skip


@dataclass
class Call:
    """What the denoiser was asked in a training step, and what it said."""

    x_t: Tensor
    t: Tensor
    x0: Tensor
    output: Tensor


@dataclass
class Spy:
    """In the place of a backbone's `predict`."""

    backbone: Any
    task: Any
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.inner, self.encode = self.backbone.predict, self.task.encode
        self.backbone.predict = self
        object.__setattr__(self.task, "encode", self.encoded)  # the task is a frozen record

    def encoded(self, *batch: Any) -> Any:
        """In the place of the task's `encode`, for the clean latents."""
        found = self.encode(*batch)
        self.x0 = found.x0
        return found

    def __call__(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.inner(x_t, t, condition)
        self.calls.append(Call(x_t, t, self.x0, output.detach()))
        return output


class Losses(lightning.Callback):
    """The loss that Lightning got from the step."""

    found: Tensor

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.found = outputs["loss"].detach()


def photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        colour = (40 * number, 255 - 60 * number, 90)
        Image.new("RGB", (40, 48), colour).save(folder / f"{folder.name}-{number}.png")
    return folder


def step(
    backbone: Any, tree: dict[str, Any], words: list[str], prepare: Callable[[Plan], None]
) -> tuple[Tensor, Batch, Call]:
    """One step of Lightning on the module that `fit` builds; prepare: changes the weights first."""
    given = [f"methods.{name}={options}" for name, options in tree.items()]
    chosen = load_recipe([*words, "methods.selective=null", *given])
    train, _ = chosen.data.open(needs(chosen, backbone))
    plan = apply_methods(backbone, chosen.methods)
    prepare(plan)
    module, losses = module_of(chosen, backbone, plan), Losses()
    spy = Spy(backbone, module.task)
    planned = Planned(train, step_plan(chosen, train), None, 0, 1)
    # one whose photos stand small on their canvas, so that the mask leaves latents out
    batch = next(b for b in map(planned.__getitem__, range(20)) if (masks_of(b) == 0).any())
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[losses], enable_checkpointing=False, **quiet
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    (call,) = spy.calls
    return losses.found, batch, call


def masks_of(batch: Batch) -> Tensor:
    assert batch.masks is not None
    return batch.masks


def expected(batch: Batch, call: Call, alphas_cumprod: Tensor) -> Tensor:
    """mean over photos + prior_weight * mean over class images (DreamBooth, arXiv 2208.12242,
    equation 2) of the mean squared error of v = alpha noise - sigma x0 where the photo is."""
    photos_, others = [], []
    for row, key in enumerate(batch.keys):
        squared = alphas_cumprod[int(call.t[row])].double()
        alpha, sigma = squared.sqrt(), (1 - squared).sqrt()
        x_t, x0 = call.x_t[row].double(), call.x0[row].double()
        v = alpha * (x_t - alpha * x0) / sigma - sigma * x0
        errors = [
            (call.output[row, channel, y, x] - v[channel, y, x]) ** 2
            for channel, y, x in torch.ones_like(x0).nonzero().tolist()
            if masks_of(batch)[row, 0, y, x]
        ]
        (others if key.startswith("class") else photos_).append(torch.stack(errors).mean())
    assert len(photos_) == len(others) == 2
    return torch.stack(photos_).mean() + PRIOR_WEIGHT * torch.stack(others).mean()


@pytest.fixture
def words(tiny_folder: Path, tmp_path: Path) -> list[str]:
    own = [f"backbone={tiny_folder}", f"data.concept={photos(tmp_path / 'mine', 3)}"]
    return [*WORDS, *own, f"data.prior_folder={photos(tmp_path / 'class', 2)}"]


def test_photos_under_their_mask_and_class_images_by_their_weight(
    words: list[str], tiny: Any
) -> None:
    tree = {"lora": "{rank: 2, sites: cross}"}
    found, batch, call = step(tiny, tree, words, lambda _: None)
    wanted = expected(batch, call, tiny.alphas_cumprod)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


def test_c_lora_adds_its_penalty(words: list[str], tiny: Any) -> None:
    """lambda * sum over layers of | |A_0 B_0| (.) A_1 B_1 |_F^2, arXiv 2304.06027, section 3, the
    deltas of strength alpha / rank = 2."""
    tree = {"c_lora": "{rank: 2, alpha: 4, task: 1, penalty: 50}"}
    terms: list[Tensor] = []

    def prepare(plan: Plan) -> None:
        own = dict(tiny.named_parameters())
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in plan.stored:
                own[name].copy_(0.3 * torch.randn(own[name].shape, generator=generator))
        for name in plan.names:
            if ".lora_B." in name:
                down = name.replace("lora_B", "lora_A")
                last, first = (
                    2 * own[up].detach().double() @ own[side].detach().double()
                    for up, side in (
                        (name, down),
                        (
                            name.replace("c_lora-1", "c_lora-0"),
                            down.replace("c_lora-1", "c_lora-0"),
                        ),
                    )
                )
                terms.append(((first.abs() * last) ** 2).sum())

    found, batch, call = step(tiny, tree, words, prepare)
    assert len(terms) == 2 * sum(site.kind == "cross" for site in tiny.sites)
    extra = 50 * torch.stack(terms).sum()
    wanted = expected(batch, call, tiny.alphas_cumprod)
    assert float(extra) > 0.1 * float(wanted)
    torch.testing.assert_close(found.double(), wanted + extra, rtol=1e-4, atol=0)


def test_coda_prompt_adds_its_orthogonality(words: list[str], tiny: Any) -> None:
    """ortho * sum over sites and over B of P, K, A of |B B^T - I|^2, arXiv 2211.13218, equation 8,
    over the parts of the tasks so far."""
    tree = {"coda_prompt": "{pool: 5, length: 4, task: 1, num_tasks: 2, ortho: 0.7}"}
    terms: list[Tensor] = []

    def prepare(plan: Plan) -> None:
        own = dict(tiny.named_parameters())
        with torch.no_grad():
            for name in plan.names:
                own[name].mul_(1.5)
        for name in plan.names:
            first, last = (
                own[name.replace("tasks.1", task)].detach().double().flatten(1)
                for task in ("tasks.0", "tasks.1")
            )
            rows = [*first, *last]
            for i, one in enumerate(rows):
                for j, other in enumerate(rows):
                    terms.append((one @ other - float(i == j)) ** 2)

    found, batch, call = step(tiny, tree, words, prepare)
    extra = 0.7 * torch.stack(terms).sum()
    wanted = expected(batch, call, tiny.alphas_cumprod)
    assert float(extra) > 0.1 * float(wanted)
    torch.testing.assert_close(found.double(), wanted + extra, rtol=1e-4, atol=0)


def test_a_swap_adds_its_distillation(
    words: list[str], tiny: Any, tiny_folder: Path, open_folder: Callable[[Path], Any]
) -> None:
    """distill * mean over sites of |y - y0|^2 / |y0|^2, y0 of the layers of an untouched model on
    the same input."""
    tree = {
        "linear_attention": "{sites: self, distill: 6}",
        "lora": "{rank: 2, sites: self}",
    }
    plain = open_folder(tiny_folder)
    terms: list[Tensor] = []

    def prepare(plan: Plan) -> None:
        own = dict(tiny.named_parameters())
        with torch.no_grad():
            for name in plan.names:
                own[name].add_(0.1)
        for site in tiny.sites:
            if site.kind == "self":
                site.module.register_forward_hook(compare(plain.unet.get_submodule(site.name)))

    def compare(original: nn.Module) -> Callable[..., None]:
        def hook(_: Any, given: Any, y: Tensor) -> None:
            with torch.no_grad():
                y0 = original(given[0])
            terms.append(((y.detach() - y0) ** 2).sum().double() / (y0**2).sum())

        return hook

    found, batch, call = step(tiny, tree, words, prepare)
    assert len(terms) == sum(site.kind == "self" for site in tiny.sites)
    extra = 6 * torch.stack(terms).mean()
    wanted = expected(batch, call, tiny.alphas_cumprod)
    assert float(extra) > 0.1 * float(wanted)
    torch.testing.assert_close(found.double(), wanted + extra, rtol=1e-4, atol=0)
