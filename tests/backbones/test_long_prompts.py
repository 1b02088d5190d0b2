"""Long prompts: read in parts, each with a begin and an end, in training, previews, `sample` and
`evaluate` alike; and read from files as transformers reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from trainer.__main__ import main
from trainer.backbones import load_backbone
from trainer.backbones.prompt_tokens import lower_but, prompt_reader
from trainer.config.lineage import backbone_spec, spec_of
from trainer.methods.weight.new_token import NewToken

LONG = "a fox on a blue background " * 9  # 54 words, more than the 30 tokens of one call


def longer(folder: Path, most: int) -> Any:
    spec = backbone_spec(str(folder)).model_copy(update={"max_tokens": most})
    return load_backbone(spec, str(folder)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny_folder", "dit_folder"])
def test_parts_are_encoded_apart_and_put_in_a_row(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(kind)
    model, plain = longer(folder, 90), longer(folder, 30)
    ids = plain.tokenizer(LONG, add_special_tokens=False).input_ids
    begin, end = plain.tokenizer("").input_ids
    rows = [[begin, *ids[n : n + 30], end] for n in (0, 30, 60)]
    rows = [row + [plain.tokenizer.pad_token_id] * (32 - len(row)) for row in rows]
    wide = torch.tensor(rows)
    mask = torch.tensor(
        [[1] * 32, [1] * (len(ids) - 30 + 2) + [0] * (60 - len(ids)), [1, 1] + [0] * 30]
    )
    given = {"attention_mask": mask} if kind == "dit_folder" else {}
    parts = model.text_encoder(wide, **given).last_hidden_state
    both = model.encode_prompts([LONG, ""])
    assert both.tokens.shape == (2, 96, 128) and model.text_length == 96
    torch.testing.assert_close(both.tokens[0], parts.flatten(0, 1))
    if kind == "dit_folder":
        assert both.mask[0].tolist() == mask.flatten().tolist()
    # one part is what is read without the option
    torch.testing.assert_close(
        plain.encode_prompts([LONG]).tokens, load_backbone(backbone_spec(str(folder)), "x").eval()
        .encode_prompts([LONG]).tokens, rtol=0, atol=0,
    )  # fmt: skip


def test_a_number_that_does_not_divide_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"parts of 30 tokens; give a multiple, as in .*=60"):
        longer(tiny_folder, 40)


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "vocab and merges"])
def test_files_are_read_as_transformers_reads_them(
    old: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        (folder / path.name).symlink_to(path)
    if old:
        (folder / "tokenizer").unlink()
        (folder / "tokenizer").mkdir()
        files = tiny_folder / "tokenizer"
        whole = json.loads((files / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(whole["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in whole["merges"])
        (folder / "tokenizer" / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        config = (files / "tokenizer_config.json").read_text()
        (folder / "tokenizer" / "tokenizer_config.json").write_text(config)
    real = load_backbone(backbone_spec(str(folder)), "mine")
    NewToken(tokens=("<v1>", "sks")).apply(real)
    own = prompt_reader(backbone_spec(str(folder)), ("<v1>", "sks"))
    assert own is not None and (own.read, own.chunk) == (30, 30)
    texts = ["A <v1> fox, asks SKS!", "the  fox's\n12 <V1>", "été 你好 <|endoftext|>", "", LONG]
    for text in texts:
        assert list(own.ids(text)) == real.prompts.ids(text), text
    assert isinstance(real.tokenizer, CLIPTokenizer)


def test_lower_case_leaves_added_words() -> None:
    """`Zwx,` was read in lower case by PixArt, so that the word of `Zwx` never trained."""
    assert lower_but("A  Zwx, and Cat", {"Zwx"}) == "a Zwx, and cat"
    assert lower_but("A Cat", ()) == "a cat"


def test_a_word_beyond_one_call_trains_with_parts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The row of a word that was cut off moved by exactly 0."""
    from PIL import Image

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32), (90 * number, 20, 200)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"{LONG} with a <v1>")
    words = ["recipe=custom_diffusion", f"backbone={tiny_folder}", f"data.concept={photos}",
             "data.class_word=null", "data.prior_weight=0", "run.steps=1", "run.batch_size=1",
             "run.validate_every=0", "preview.every=0", "tracker=none", "data.augment=false",
             f"run.out={tmp_path}", "run.id=x", "optim.weight_decay=0", "optim.lr=0.1"]  # fmt: skip
    assert main(["check", *words]) != 0
    said = capsys.readouterr().err
    assert "0.txt: the caption is 57 tokens long, of which 30 are read, and <v1> is beyond" in said
    assert "or give text.max_tokens=60" in said
    assert main(["fit", *words, "text.max_tokens=60"]) == 0
    adapter = tmp_path / "custom_diffusion" / "x" / "adapter.safetensors"
    (row,) = [value for name, value in load_file(adapter).items() if ".rows." in name]
    fresh = load_backbone(backbone_spec(str(tiny_folder)), "x")
    name = NewToken(tokens=("<v1>",)).apply(fresh).trains[0]
    assert not torch.equal(row, fresh.get_parameter(name))
    from trainer.config.header import read_header

    assert spec_of(read_header(adapter)[0]).max_tokens == 60
    prompt = f"prompt={LONG} with a <v1>"
    out = ["steps=1", f"out={tmp_path / 'out'}"]
    assert main(["sample", f"adapter={adapter}", prompt, *out]) == 0
    assert "longer" not in capsys.readouterr().err
    assert main(["sample", f"adapter={adapter}", f"prompt={LONG} {LONG} <v1>", *out]) != 0
    assert "text.max_tokens=120" in capsys.readouterr().err
    assert main(["sample", f"adapter={adapter}", "prompt=a <v11>", *out]) != 0
    assert "<v11> is no word of this model; did you mean <v1>?" in capsys.readouterr().err
    assert main(["sample", f"adapter={adapter}", f"prompt={LONG} {LONG}", *out]) == 0
    assert "longer than the 60 tokens that are read" in capsys.readouterr().err
    assert backbone_spec(str(adapter)).max_tokens == 60  # a run over it reads as it does
