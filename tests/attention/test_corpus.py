"""Every denoiser class of the pinned diffusers is hosted to the bit, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from attention.denoiser_corpus import CASES, make
from attention.denoiser_page import Found, Halved, found, page

from trainer.attention.host import Host

PAGE = Path(__file__).parents[2] / "docs" / "denoisers.md"
REFUSED = {
    "AnyFlowFARTransformer3DModel": "another back end",
    "ConsisIDTransformer3DModel": "a softmax by hand",
    "Kandinsky6SRTransformer3DModel": "another back end",
    "SanaWMTransformer3DModel": "no softmax attention call",
    "UNet1DModel": "a softmax by hand",
    "WanAnimate2Transformer3DModel": "another back end",
}
# the default of `Attention(scale_qk=False)` is diffusers' older processor, with its own rounding
ROUNDED = {"T5FilmDecoder"}
STOPPED = {
    "MochiTransformer3DModel": "attends row by row",
    "SanaWMLTX2RefinerTransformer3DModel": r"never reached: transformer_blocks\.0\.audio_attn1",
}
LINEAR = {"SanaVideoTransformer3DModel": 2}
# they pool text or time, before the blocks
POOLERS = {
    "HunyuanDiT2DModel": "time_extra_emb.pooler.v_proj",
    "MochiTransformer3DModel": "time_embed.pooler.to_kv",
}


@pytest.mark.parametrize("name", sorted(set(CASES) - set(REFUSED)))
def test_it_is_hosted_to_the_bit_and_every_layer_is_a_site(name: str) -> None:
    result: Found = found(name)
    assert not result.refused
    assert result.equal != (name in ROUNDED)
    assert result.near
    assert result.restored
    assert len(result.unhosted) == LINEAR.get(name, 0)
    assert result.outside == ([POOLERS[name]] if name in POOLERS else [])
    assert result.strays == 0
    assert bool(result.stopped) == (name in STOPPED)
    if name not in STOPPED:
        assert result.changed
        assert not result.unreached


@pytest.mark.parametrize("name", STOPPED)
def test_an_op_that_cannot_run_says_so(name: str) -> None:
    import re

    assert re.search(STOPPED[name], found(name).stopped)


def test_an_op_is_refused_at_once_where_rows_attend_one_by_one() -> None:
    """Not in the first step of training, after all has been loaded and cached."""
    host = Host.attach(make(CASES["MochiTransformer3DModel"]))
    with pytest.raises(ValueError, match=r"acts on whole batches, and .* attends row by row"):
        host.install(Halved(), host.sites)
    assert not any(hosted.ops for hosted in host.processors.values())


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_layer_and_the_reason(name: str) -> None:
    assert " is not hosted: " in found(name).refused
    assert " at '" in found(name).refused
    assert REFUSED[name] in found(name).refused


def test_the_page_says_what_the_host_makes_of_each_class() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()
