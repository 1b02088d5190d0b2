"""What each family of transformers on a flow owes, asked of a tiny folder of it: `Case` names the
folder and the stock pipeline, and the tests of the family call these."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from edited import edit
from torch import Tensor
from two_steps import two_steps

from trainer.attention.call import SiteCall
from trainer.attention.op import Traits
from trainer.backbones import load_backbone
from trainer.backbones.folder_facts import facts_of
from trainer.backbones.prompt_tokens import prompt_length
from trainer.backbones.spec import BackboneSpec
from trainer.config.lineage import backbone_spec
from trainer.config.load import load_recipe, methods_of
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.export.export import export
from trainer.methods.apply import apply_methods
from trainer.runs.adapter import load_adapted
from trainer.training.step_memory import step_bytes
from trainer.training.tasks.denoise import Denoise

PROMPTS = ["a fox on a red background", "an apple left of a cat"]
SEEDS = [3, 4]
STEPS = 3
CLOSE = 2 / 255
SIZE = (32, 48)
LORA: dict[str, Any] = {"lora": {"sites": "all", "rank": 2}}


@dataclass(frozen=True)
class Case:
    """pipeline: the class of the stock pipeline. channels, grid: of the latents of `SIZE`. pack:
    latents (b, c, h, w) as the stock pipeline takes them."""

    folder: Path
    pipeline: Any
    channels: int
    grid: tuple[int, int]
    pack: Callable[[Tensor], Tensor] = field(default=lambda x_t: x_t)
    given: dict[str, Any] = field(default_factory=dict)

    def stock(self, **options: Any) -> Any:
        pipe = self.pipeline.from_pretrained(self.folder, **(self.given | options))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def painted(self, pipe: Any, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
        """What a stock pipeline makes from the noise of the seeds."""
        own = {"num_inference_steps": STEPS, "height": SIZE[0], "width": SIZE[1]}
        x_t = self.pack(noise(self.channels, *self.grid))
        pictures: Tensor = pipe(
            prompt=prompts, latents=x_t, output_type="pt", **(own | options)
        ).images
        return pictures


def noise(*shape: int, seeds: list[int] = SEEDS) -> Tensor:
    drawn = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.cat(drawn)


def drawn(model: Any, prompts: list[str] = PROMPTS, **options: Any) -> Tensor:
    """What our sampler makes from the noise of the seeds, in [0, 1]."""
    return sample(model, prompts, SEEDS, settings=Sampling(STEPS, size=SIZE, **options)) / 2 + 0.5


def close(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= CLOSE and float(other.std()) > 0.05


class Noted:
    """An op that keeps the queries it sees and where the text lies among them."""

    name, traits = "noted", Traits()

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, slice]] = []

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        self.seen.append((q, call.spans(q.shape[2]).text))
        return q, k, v


@torch.no_grad()
def text_lies_where_declared(model: Any) -> None:
    """With other text, the queries of the first joint layer change where the text is, and only
    there."""
    model.eval()
    condition, op = model.encode_prompts(PROMPTS), Noted()
    other = replace(condition, tokens=condition.tokens.flip(1) + 1)
    model.host.install(op, [site for site in model.sites if site.kind == "joint"][:1])
    for told in (condition, other):
        model.predict(noise(model.latent_channels, 4, 6), torch.tensor([500.0, 500.0]), told)
    (one, text), (two, _) = op.seen
    changed = (one != two).any(dim=3).any(dim=1).any(dim=0)
    wanted = torch.zeros_like(changed)
    wanted[text] = True
    assert 0 < int(wanted.sum()) < len(wanted) and torch.equal(changed, wanted)


def prompts_are_counted_before_loading(model: Any, folder: Path, tokenizer: str) -> None:
    """As the loaded model counts them, though the tokenizer's own file names no length; folder: a
    copy that may be changed."""
    edit(folder / tokenizer / "tokenizer_config.json", model_max_length=int(1e30))
    assert prompt_length(backbone_spec(str(folder))) == model.prompts.length


def batch_of(step: int = 0, words: str = "a <v1> fox") -> Batch:
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(step)) * 2 - 1
    captions = [words, "a cat"]
    return Batch(step, [0, 1], captions, captions, torch.ones(2), pixels=pixels)


def trained(model: Any, tree: dict[str, Any], path: Path, folder: Path) -> Path:
    """The adapter of methods that take two steps on random pictures."""
    return two_steps(model, tree, path, folder=folder, batch_of=batch_of, lr=1e-1, every=True)


def check_saved(model: Any, case: Case, tree: dict[str, Any], path: Path) -> None:
    """What two steps have trained changes the pictures, and is the same when it is read again."""
    before = drawn(model.eval(), guidance=1.0)
    trained(model, tree, path, case.folder)
    after = drawn(model.eval(), guidance=1.0)
    loaded, _ = load_adapted(path)
    assert torch.equal(drawn(loaded.eval(), guidance=1.0), after)
    assert float((after - before).abs().max()) > 1e-3


def check_export(model: Any, case: Case, written: str, tmp_path: Path) -> Path:
    """An export is proven, and a stock pipeline paints with it what our sampler paints."""
    path = trained(model, LORA, tmp_path / "a.safetensors", case.folder)
    lines: list[str] = []
    out = export(path, tmp_path / "out", written, say=lines.append)
    assert any("largest difference" in line for line in lines)
    assert any("the call in README.md gives a picture" in line for line in lines)
    return out


def check_loss(model: Any) -> None:
    """x_t = (1 - t) x0 + t noise, and the target noise - x0."""
    task = Denoise(model, Objective(model.target, model.alphas_cumprod))
    assert (model.target, model.alphas_cumprod) == ("flow", None)
    with torch.no_grad():
        state = task.encode(batch_of())
        result = task.loss(state)
        output = model.predict(state.x_t, state.t, state.condition)
    sigma = (state.t / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(state.x_t, (1 - sigma) * state.x0 + sigma * state.noise)
    error = (output - (state.noise - state.x0)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result.losses, error)


def check_spoiled(
    case: Case, family: str, spoiled: tuple[str, dict[str, Any], str], copy: Path
) -> None:
    """spoiled: a file of the folder, other values in it, and what is said then; copy: where to."""
    file, changes, message = spoiled
    edit(Path(shutil.copytree(case.folder, copy)) / file, **changes)
    with pytest.raises(ValueError, match=message):
        load_backbone(BackboneSpec(folder=str(copy), family=family), "mine")


def check_folder_facts(model: Any, folder: Path) -> None:
    """What is said of a folder before torch is imported is so of the backbone that is loaded."""
    facts = facts_of(backbone_spec(str(folder)))
    assert facts is not None
    assert facts.flow == (model.alphas_cumprod is None)
    assert (facts.multiple, facts.side) == (model.multiple, model.resolution)
    assert (facts.frames, facts.distilled) == (model.clip_frames, model.distilled)


def check_plan(model: Any, case: Case) -> None:
    """A recipe is planned without torch's values: the network is called with all it is told."""
    words = ["recipe=lora", f"backbone={case.folder}", "data.prior_weight=0", "run.resolution=32"]
    apply_methods(model, methods_of(LORA))
    one, two = (step_bytes(load_recipe(words), model, rows) for rows in (1, 2))
    assert 1.5 * one < two < 2.5 * one
