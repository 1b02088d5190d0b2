"""The family of Chroma against stock diffusers: T5 alone, its masks, classifier-free guidance."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow_checks as checks
import pytest
import torch
from diffusers import ChromaPipeline, FluxPipeline
from flow_folders import chroma_pipeline, make_flow_folder
from torch import Tensor

from trainer.backbones import load_backbone
from trainer.backbones.families import family_of
from trainer.backbones.spec import BackboneSpec
from trainer.config.lineage import backbone_spec

Open = Callable[[Path], Any]


def pack(x_t: Tensor) -> Tensor:
    rows, channels, height, width = x_t.shape
    packed: Tensor = FluxPipeline._pack_latents(x_t, rows, channels, height, width)
    return packed


class Masking(ChromaPipeline):
    """The stock pipeline, its mask a mask: attention adds numbers to its scores."""

    def _prepare_attention_mask(self, *args: Any, **kwargs: Any) -> Tensor | None:
        mask: Tensor | None = super()._prepare_attention_mask(*args, **kwargs)
        return None if mask is None else mask.bool()


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> checks.Case:
    folder = make_flow_folder(tmp_path_factory.mktemp("chroma") / "hd", chroma_pipeline)
    return checks.Case(folder, ChromaPipeline, channels=4, grid=(16, 24), pack=pack)


@pytest.fixture
def model(case: checks.Case, open_folder: Open) -> Any:
    return open_folder(case.folder)


def masking(case: checks.Case) -> Any:
    pipe = Masking(**case.stock().components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def test_prompts_and_their_mask_are_those_of_the_stock_pipeline(
    model: Any, case: checks.Case
) -> None:
    assert family_of(case.folder) == model.family == "chroma"
    text, _, mask, empty, _, nothing = case.stock().encode_prompt(checks.PROMPTS)
    own = model.encode_prompts([*checks.PROMPTS, "", ""])
    torch.testing.assert_close(own.tokens, torch.cat([text, empty]), rtol=0, atol=1e-6)
    assert torch.equal(own.mask, torch.cat([mask, nothing]))
    assert model.text_shapes == {"tokens": (512, 40), "mask": (512,)}
    counts = model.tokenizer([*checks.PROMPTS, "", ""]).input_ids
    assert own.mask.sum(1).tolist() == [len(ids) + 1 for ids in counts]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_those_of_the_stock_pipeline_that_masks(
    guidance: float, model: Any, case: checks.Case
) -> None:
    """As it is published, the stock pipeline lets the network see all padding: see `chroma.py`."""
    own = checks.drawn(model, guidance=guidance, negative="a tree" if guidance > 1 else "")
    given = {"guidance_scale": guidance, "negative_prompt": "a tree"}
    assert checks.close(own, case.painted(masking(case), **given))
    unmasked = case.painted(case.stock(), **given)
    assert float((own - unmasked).abs().max()) > checks.CLOSE, "mended: compare with stock as it is"


@torch.no_grad()
def test_padding_is_not_seen(model: Any) -> None:
    """What stands behind the first token of padding changes nothing."""
    x_t, t = checks.noise(4, 8, 8), torch.tensor([100.0, 700.0])
    condition = model.encode_prompts(checks.PROMPTS)
    before = model.predict(x_t, t, condition)
    seen = condition.mask.bool()[..., None]
    other = condition.map(lambda value: value)
    other.tokens.copy_(torch.where(seen, condition.tokens, torch.randn_like(condition.tokens)))
    torch.testing.assert_close(model.predict(x_t, t, other), before, rtol=0, atol=1e-6)


def test_the_loss_is_that_of_a_flow(model: Any) -> None:
    checks.check_loss(model)


def test_what_trains_is_saved_and_read_again(model: Any, case: checks.Case, tmp_path: Path) -> None:
    checks.check_saved(model, case, checks.LORA, tmp_path / "a.safetensors")


def test_a_stock_pipeline_paints_with_the_adapter(
    model: Any, case: checks.Case, tmp_path: Path
) -> None:
    out = checks.check_export(model, case, "diffusers", tmp_path)
    pipe = masking(case)
    base = case.painted(pipe, guidance_scale=1.0)
    pipe.load_lora_weights(out)
    wanted = case.painted(pipe, guidance_scale=1.0)
    assert checks.close(checks.drawn(model.eval(), guidance=1.0), wanted)
    assert float((wanted - base).abs().max()) > 2 * checks.CLOSE


def test_a_spoiled_folder_is_refused(case: checks.Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"d_model": 48}))
    with pytest.raises(ValueError, match="width 40, and its text_encoder gives 48"):
        load_backbone(BackboneSpec(folder=str(folder), family="chroma"), "mine")
    with pytest.raises(ValueError, match="is a ChromaPipeline; this family loads FluxPipeline"):
        load_backbone(BackboneSpec(folder=str(case.folder), family="flux1"), "mine")


def test_the_backbone_of_the_hub_is_pinned() -> None:
    spec = backbone_spec("chroma")
    assert (spec.family, spec.hub) == ("chroma", "lodestones/Chroma1-HD")
    assert len(str(spec.revision)) == 40


def test_text_lies_where_it_is_declared(model: Any) -> None:
    checks.text_lies_where_declared(model)


def test_prompts_are_counted_before_loading(model: Any, case: checks.Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder, tmp_path / "copy"))
    checks.prompts_are_counted_before_loading(model, folder, "tokenizer")
