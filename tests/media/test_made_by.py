"""What made a picture or clip, read from its file as UIs read it; and files that are never written
over by another picture."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.__main__ import main
from trainer.data.kept import kept_pictures
from trainer.media.made_by import comment, parameters, png_bytes, with_facts
from trainer.media.write_video import write_clip, write_frames

FACTS = {
    "prompt": "a <v1> cat, ein großes 猫", "negative": "blurry: dark", "seed": 3, "steps": 25,
    "sampler": "DDIM", "guidance": 5.0, "size": "64x64", "backbone": "tiny",
    "adapter": "lora/my run", "adapter_sha256": "0123456789abcdef", "version": "x 1",
}  # fmt: skip
# as the A1111 web UI reads the last line (modules/infotext_utils.py)
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def as_a_ui_reads(text: str) -> dict[str, str]:
    *lines, last = text.strip().split("\n")
    found = dict(PARAMETER.findall(last))
    negative = next((line for line in lines if line.startswith("Negative prompt: ")), "")
    prompt = "\n".join(line for line in lines if line != negative)
    return {"prompt": prompt, "negative": negative.removeprefix("Negative prompt: ")} | found


def wanted() -> dict[str, str]:
    return {
        "prompt": FACTS["prompt"], "negative": FACTS["negative"], "Steps": "25",
        "Sampler": "DDIM", "CFG scale": "5", "Seed": "3", "Size": "64x64", "Model": "tiny",
        "Adapter": "lora/my run", "Adapter hash": "0123456789abcdef", "Version": "x 1",
    }  # type: ignore[dict-item]  # fmt: skip


def test_a_png_says_it_in_the_form_that_uis_read(tmp_path: Path) -> None:
    (path,) = write_clip(torch.zeros(1, 3, 8, 8), tmp_path / "a", 8.0, facts=FACTS)
    with Image.open(path) as picture:
        text = picture.text  # type: ignore[attr-defined]
    assert as_a_ui_reads(text["parameters"]) == wanted()
    assert json.loads(text["attention_trainer"]) == FACTS


def test_a_gif_and_an_mp4_say_it(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    pictures = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 3, 8, 8)
    video, loop = write_clip(pictures, tmp_path / "a", 8.0, facts=FACTS | {"frames": 3})
    with Image.open(loop) as clip:
        found = [clip.info["comment"].decode()]
    with av.open(str(video)) as container:
        found.append(container.metadata["comment"])
    for text in found:
        read = as_a_ui_reads(text)
        own = json.loads(json.loads(read.pop("Attention trainer")))
        frames = sha256()
        for grey in (0, 128, 255):
            frames.update(b"(8, 8)" + bytes([grey]) * 192)
        assert own == FACTS | {"frames": 3, "frames_sha256": frames.hexdigest()}
        assert read == wanted() | {"Frames": "3"}


def test_a_prompt_of_several_lines_and_marks_comes_back() -> None:
    facts = {"prompt": "a\nb: c, d", "backbone": 'my "model", v1', "seed": 0}
    read = as_a_ui_reads(parameters(facts))
    assert read["prompt"] == "a\nb: c, d"
    assert json.loads(read["Model"]) == 'my "model", v1'
    assert "\0" not in comment({"prompt": "a\0b"})


def test_the_same_picture_and_facts_give_the_same_bytes() -> None:
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert png_bytes(with_facts(image.copy(), FACTS)) == png_bytes(with_facts(image.copy(), FACTS))


def test_another_picture_gets_another_name(tmp_path: Path) -> None:
    one, other = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    place = tmp_path / "a"
    first = write_clip(one, place, 8.0, facts=FACTS)
    assert write_clip(one, place, 8.0, facts=FACTS) == first
    assert [path.name for path in write_clip(other, place, 8.0, facts=FACTS)] == ["a-2.png"]
    differs = FACTS | {"steps": 3}
    assert [path.name for path in write_clip(one, place, 8.0, facts=differs)] == ["a-3.png"]
    clips = [write_clip(torch.cat([one, x]), place, 8.0, facts=FACTS) for x in (one, other)]
    assert [sorted(path.stem for path in clip) for clip in clips] == [["a", "a"], ["a-2", "a-2"]]
    assert len(list(tmp_path.iterdir())) == 7


def test_frames_of_a_preview_are_written_over(tmp_path: Path) -> None:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    first = write_frames(images, tmp_path / "a", 8.0)
    assert write_frames(images[::-1], tmp_path / "a", 8.0) == first


def test_class_images_say_what_made_them(tmp_path: Path) -> None:
    def make(batch: range) -> list[Image.Image]:
        return [with_facts(Image.new("RGB", (16, 16)), FACTS | {"seed": n}) for n in batch]

    kept_pictures(tmp_path, 3, make, at_once=2, what="class images")
    for number in range(3):
        with Image.open(tmp_path / f"{number:05d}.png") as picture:
            assert json.loads(picture.text["attention_trainer"])["seed"] == number  # type: ignore[attr-defined]


def test_sample_keeps_the_pictures_of_prompts_that_begin_alike(
    tiny_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    common = "a very long prompt about a fox that sits beside a red ball on a blue background"
    words = ["sample", f"backbone={tiny_folder}", "steps=1", "guidance=3", f"out={out}"]
    for prompt in (f"{common} at noon", f"{common} at night", f"{common} at noon"):
        assert main([*words, f"prompt={prompt}"]) == 0
    assert main([*words, f"prompt={common} at noon", "negative=red"]) == 0
    printed = capsys.readouterr().out.split()
    assert printed[0] == printed[2]
    assert len(set(printed)) == len(list(out.iterdir())) == 3
    facts = []
    for line in dict.fromkeys(printed):
        with Image.open(line) as picture:
            facts.append(json.loads(picture.text["attention_trainer"]))  # type: ignore[attr-defined]
    assert [own["prompt"] for own in facts] == [
        f"{common} at noon", f"{common} at night", f"{common} at noon"
    ]  # fmt: skip
    assert [own.get("negative") for own in facts] == [None, None, "red"]
    parts = facts[0].pop("backbone_parts")
    assert sorted(parts) == ["scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert facts[0] | {"version": ""} == {
        "prompt": f"{common} at noon", "seed": 0, "steps": 1, "guidance": 3.0, "sampler": "DDIM",
        "size": "32x32", "backbone": "tiny", "device": "cpu", "computes_in": "float32",
        "version": "", "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in out.iterdir())
    assert not any(str(tiny_folder).encode() in path.read_bytes() for path in out.iterdir())


def test_sample_names_the_adapter(
    tiny_folder: Path, tmp_path: Path, save_trained_on: Any, capsys: Any
) -> None:
    path = save_trained_on(tiny_folder, {"lora": {"sites": "cross"}})
    words = ["sample", f"adapter={path}", "steps=1", f"out={tmp_path / 'out'}", "prompt=a fox"]
    assert main(words) == 0
    with Image.open(capsys.readouterr().out.strip()) as picture:
        own = json.loads(picture.text["attention_trainer"])  # type: ignore[attr-defined]
    import hashlib

    assert own["adapter"] == "trained"
    assert own["adapter_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
