"""The source `folder`: what it reads, holds out and refuses, and what each refusal says."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data import folder_photos
from trainer.data.identity import changed_samples
from trainer.data.source import Needs, Source
from trainer.data.source_checks import KEEP_BYTES
from trainer.data.sources import folder
from trainer.data.sources.folder import Folder
from trainer.media.images import resize_cover, to_tensor

RNG = np.random.default_rng(0)


def noise(seed: int = 0, width: int = 40, height: int = 24) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def needs(path: Path, resolution: int = 16) -> Needs:
    return Needs(resolution, 4, lambda prompts, seed, guidance: (), path / "cache", lambda: "tiny")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """1.png, 2.png, 10.png with captions "photo 1", "photo 2", "photo 10"."""
    path = tmp_path / "photos"
    path.mkdir()
    for i in (1, 2, 10):
        noise(i).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(f"photo {i}\n")
    return path


def open_folder(path: Path, **options: Any) -> Any:
    return Folder(folder=path, **options).open(needs(path.parent))


def test_reads_photos_with_their_captions_in_natural_order(photos: Path) -> None:
    train, held_out = open_folder(photos)
    assert held_out is None
    assert (len(train), train.fixed, list(train.skipped)) == (3, True, [])
    assert (train.groups, train.shares, train.weights) == ((range(3),), (1.0,), (1.0,))
    samples = [train.sample(i, RNG) for i in range(3)]
    assert [sample.key for sample in samples] == ["1.png", "2.png", "10.png"]
    assert [sample.caption for sample in samples] == ["photo 1", "photo 2", "photo 10"]
    assert [train.caption(i, RNG) for i in range(3)] == ["photo 1", "photo 2", "photo 10"]
    for i, sample in zip((1, 2, 10), samples, strict=True):
        assert sample.mask is None
        assert sample.image.equal(to_tensor(resize_cover(noise(i), 16)))


def test_photos_are_read_as_images_py_reads_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: stored on its side
    noise(3).transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a.webp", lossless=True, exif=exif
    )
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))
    clear.save(tmp_path / "b.png")
    train, _ = open_folder(tmp_path, template="a photo")
    assert train.sample(0, RNG).image.equal(to_tensor(resize_cover(noise(3), 16)))
    assert bool((train.sample(1, RNG).image == 1.0).all())  # white behind what is transparent


def test_template_is_the_caption_where_there_is_no_txt(photos: Path) -> None:
    (photos / "2.txt").unlink()
    train, _ = open_folder(photos, template="a photo of a cat")
    assert [train.caption(i, RNG) for i in range(3)] == ["photo 1", "a photo of a cat", "photo 10"]


def test_the_last_are_held_out(photos: Path) -> None:
    train, held_out = open_folder(photos, validation=2, flip=True)
    assert [train.sample(i, RNG).key for i in range(len(train))] == ["1.png"]
    assert [held_out.sample(i, RNG).key for i in range(len(held_out))] == ["2.png", "10.png"]
    assert (train.fixed, held_out.fixed) == (False, True)
    with pytest.raises(ValueError, match=r"validation=3 holds out all 3 images .* at most 2"):
        Folder(folder=photos, validation=3)


def test_flip_mirrors_every_second_time_and_draws_from_rng_only(photos: Path) -> None:
    train, _ = open_folder(photos, flip=True)
    plain = to_tensor(resize_cover(noise(1), 16))
    seen = []
    for seed in range(40):
        image = train.sample(0, np.random.default_rng(seed)).image
        assert image.equal(train.sample(0, np.random.default_rng(seed)).image)
        assert image.equal(plain) or image.equal(plain.flip(-1))
        assert train.image(0).equal(plain)
        seen.append(image.equal(plain))
    assert 10 < sum(seen) < 30


def test_fingerprint_follows_the_bytes_and_what_is_done_to_them(photos: Path) -> None:
    def of(side: int = 16, **options: Any) -> str:
        source = Folder(folder=photos, **options)
        return str(source.open(needs(photos.parent, side))[0].fingerprint())

    before = of()
    assert before == of()
    assert len({before, of(side=8), of(flip=True), of(validation=1)}) == 4
    (photos / "1.txt").write_text("other words")
    assert of() == before
    noise(9).save(photos / "2.png")
    assert of() != before
    swapped = (photos / "1.png").read_bytes()
    before = of()
    (photos / "1.png").write_bytes((photos / "10.png").read_bytes())
    (photos / "10.png").write_bytes(swapped)
    assert of() != before


def test_masks_are_weights_of_latents(photos: Path) -> None:
    """They were trained on as photos, or refused as photos without a caption."""
    mask = Image.new("L", (40, 24))
    mask.paste(255, (20, 0, 40, 24))  # the right half
    mask.save(photos / "2_mask.png")
    train, held_out = open_folder(photos, validation=2)
    assert (len(train), len(held_out)) == (1, 2)
    assert train.sample(0, RNG).mask is None
    own = held_out.sample(0, RNG).mask
    assert own.tolist() == [[[0.0, 0.0, 1.0, 1.0]] * 4]  # of the centre, a latent for 4 pixels
    assert held_out.loss_mask(0).equal(own) and held_out.loss_mask(1) is None
    flipped, _ = open_folder(photos, flip=True)
    seen = {
        tuple(flipped.sample(1, np.random.default_rng(n)).mask[0, 0].tolist()) for n in range(9)
    }
    assert seen == {(0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.0)}
    mask.paste(0, (8, 0, 32, 24))  # nothing of the centre
    mask.save(photos / "2_mask.png")
    with pytest.raises(
        ValueError, match=r"2_mask\.png: its mask leaves nothing of the centre of 16"
    ):
        open_folder(photos)
    open_buckets = open_folder(photos, buckets=4)[0]
    assert sum(index in open_buckets.masks for index in range(3)) == 1
    (photos / "2.png").unlink()
    with pytest.raises(RecipeError, match=r"2_mask\.png: a mask by its name, and no photo 2 is"):
        build_section(Folder, {"folder": str(photos)}, "data")


@pytest.mark.parametrize("keep", [0, KEEP_BYTES])
def test_samples_are_the_same_kept_or_read_anew(
    photos: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_photos, "KEEP_BYTES", keep)
    train, _ = open_folder(photos)
    first = train.sample(0, RNG).image
    assert len(train._kept) == bool(keep)
    assert train.sample(0, RNG).image.equal(first)
    copy = pickle.loads(pickle.dumps(train))  # as for a worker
    assert copy._kept == {}
    assert copy.sample(0, RNG).image.equal(first)


def test_bad_photos_end_the_run_or_are_named(photos: Path) -> None:
    (photos / "3.gif").write_bytes(b"GIF89a")  # without a caption, but that is not its trouble
    (photos / "2.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"(?s)2 of 4 images.*2\.txt.*UTF-8.*3\.gif.*export one"):
        open_folder(photos)
    train, _ = open_folder(photos, on_bad="skip")
    assert [train.sample(i, RNG).key for i in range(2)] == ["1.png", "10.png"]
    assert [text.split(":")[0] for text in train.skipped] == ["2.png", "3.gif"]
    assert train.skipped[1] == "3.gif: a GIF, a format for animations; " + (
        "export one frame as JPEG, PNG or WebP"
    )
    source = Folder(folder=photos, on_bad="skip", validation=3)
    with pytest.raises(ValueError, match="validation=3 holds out all 2 usable"):
        source.open(needs(photos.parent))


def test_a_photo_without_caption_is_named(photos: Path) -> None:
    (photos / "2.txt").unlink()
    (photos / "10.txt").unlink()
    with pytest.raises(ValueError, match=r"no caption for .*2\.png: write it into 2\.txt .*templ"):
        Folder(folder=photos)
    (photos / "2.txt").write_text("photo 2")
    (photos / "10.png").rename(photos / "10.bmp")  # a name of a format not read, but a PNG
    with pytest.raises(ValueError, match=r"no caption for .*10\.bmp"):
        open_folder(photos)


@pytest.mark.parametrize("template", ["", " ", "a photo of a {}"])
def test_templates_that_are_no_caption_are_refused(photos: Path, template: str) -> None:
    with pytest.raises(ValueError, match="write the caption itself"):
        Folder(folder=photos, template=template)


def test_folders_without_images_are_refused_by_full_key(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.folder=.*none: no such folder; expected"):
        build_section(Folder, {"folder": str(tmp_path / "none")}, "data")
    with pytest.raises(RecipeError, match=r"data\.folder=.*: no image in this folder"):
        build_section(Folder, {"folder": str(tmp_path)}, "data")
    with pytest.raises(RecipeError, match=r"data\.folder is missing"):
        build_section(Folder, {}, "data")


def test_source_is_found_by_name_and_imports_no_torch() -> None:
    assert "folder" in Source.names()
    assert Source.find("folder") is Folder
    code = "import sys, trainer.data.sources.folder; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(folder.__file__).parents[3])


def test_repeats_and_names_of_numbered_folders(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "train"
    (root / "5_dog").mkdir(parents=True)
    (root / "2_cat").mkdir()
    noise(1).save(root / "5_dog" / "1.png")
    noise(2).save(root / "2_cat" / "1.png")
    train, _ = open_folder(root, repeats=2)
    assert [train.key(i) for i in range(2)] == ["2_cat/1.png", "5_dog/1.png"]
    assert [train.caption(i, RNG) for i in range(2)] == ["cat", "dog"]
    assert list(train.repeats) == [4, 10]
    assert Folder(folder=root, repeats=2).epoch() == 14
    assert Folder(folder=root, validation=1).epoch() == 2
    given, _ = open_folder(root, template="a pet")
    assert [given.caption(i, RNG) for i in range(2)] == ["a pet", "a pet"]
    before, now = train.identity(), open_folder(root, repeats=3)[0].identity()
    assert changed_samples(before, now) == [
        "2_cat/1.png is in an epoch 6 times and was 4 times",
        "5_dog/1.png is in an epoch 15 times and was 10 times",
    ]


def test_one_of_several_captions_is_drawn_and_a_held_out_one_stays(photos: Path) -> None:
    for i in (1, 2, 10):
        (photos / f"{i}.txt").write_text(f"photo {i}\npicture {i}")
    train, held_out = open_folder(photos, validation=1, caption_lines=True, flip=True)
    for seed in range(20):
        rngs = [np.random.default_rng(seed) for _ in range(2)]
        assert train.sample(0, rngs[0]).caption == train.caption(0, rngs[1])
    seen = {train.caption(0, np.random.default_rng(seed)) for seed in range(20)}
    assert seen == {"photo 1", "picture 1"}
    assert {held_out.caption(0, np.random.default_rng(n)) for n in range(20)} == {"photo 10"}
    whole = open_folder(photos, validation=1)[0]
    assert whole.caption(0, RNG) == "photo 1\npicture 1"
    assert train.identity() != whole.identity() and train.fixed is False
    source = Folder(folder=photos, caption_lines=True)
    assert [text for _, text, _ in source.captions()][:2] == ["photo 1", "picture 1"]


def test_tags_are_shuffled_in_training_alone(photos: Path) -> None:
    for i in (1, 2, 10):
        (photos / f"{i}.txt").write_text("dog, red, big, old")
    train, held_out = open_folder(photos, validation=1, shuffle_tags=True, keep_tags=1)
    seen = {train.caption(0, np.random.default_rng(seed)) for seed in range(60)}
    assert len(seen) == 6 and all(text.startswith("dog, ") for text in seen)
    assert {held_out.caption(0, np.random.default_rng(n)) for n in range(9)} == {
        "dog, red, big, old"
    }
    assert train.fixed  # pictures stay, so latents are cached


def test_captions_do_not_depend_on_cached_latents_or_workers(photos: Path) -> None:
    from trainer.data.loader import Planned, loader
    from trainer.data.plan import StepPlan

    for i in (1, 2, 10):
        (photos / f"{i}.txt").write_text(f"photo {i}, a, b, c\npicture {i}, a, b, c")
    train, _ = open_folder(photos, caption_lines=True, shuffle_tags=True, keep_tags=1)
    plan = StepPlan(((0, 3),), (1.0,), (1.0,), 2, 7, repeats=(1, 2, 3))
    pixels = Planned(train, plan, None, rank=0, world_size=1)
    latents = np.zeros((3, 8, 4, 4), np.float16)
    cached = Planned(train, plan, latents, rank=0, world_size=1)  # type: ignore[arg-type]
    found = [pixels[step].captions for step in range(6)]
    assert found == [cached[step].captions for step in range(6)]
    assert found == [batch.captions for batch in loader(pixels, 6, 0, workers=2)]
    assert found[3:] == [batch.captions for batch in loader(pixels, 6, 3, workers=0)]
    assert len({text for texts in found for text in texts}) > 6


def test_what_was_found_is_told(photos: Path) -> None:
    (photos / "2.txt").unlink()
    (photos / "notes.md").write_text("x")
    source = Folder(folder=photos, template="a cat")
    assert source.found() == [
        f"{photos}: 3 photos; captions: 2 from .txt, 1 from a template; masks: none"
    ]
    assert "not read: notes.md;" in source.remarks()[0]


def test_captions_are_read_once(
    photos: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a start from beginning to end: the recipe, what is said of it, and the data."""
    read, reading = Counter[str](), Path.read_bytes

    def counted(path: Path) -> bytes:
        read[path.name] += 1
        return reading(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    texts = {f"{number}.txt" for number in (1, 2, 10)}
    for number in texts:
        text = (photos / number).read_text()
        (photos / number).write_text(f"a <v1> of {text}")
    common = [f"backbone={tiny_folder}", "optim.warmup=0", "run.resolution=64"]
    folder = ["recipe=lora_folder", f"data.folder={photos}", "run.epochs=2", *common]
    concept = ["recipe=lora", f"data.concept={photos}", "data.class_word=cup", *common]
    for words in (folder, [*concept, "data.prior_weight=0"]):
        recipe = load_recipe(words)
        train, _ = recipe.data.open(needs(photos.parent, 64))
        assert len(train) == 3
        assert {name: count for name, count in read.items() if name in texts} == dict.fromkeys(
            texts, 1
        )
        read.clear()


@pytest.mark.parametrize(("spare", "reads"), [(0, 1), (-1, 2)])
def test_few_photos_are_kept_in_memory(
    spare: int, reads: int, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as all of them fit: three colours of 8 bits a pixel."""
    monkeypatch.setattr(folder_photos, "KEEP_BYTES", 3 * 16 * 16 * 3 + spare)
    train, _ = open_folder(photos)
    cut, seen = train.decoded.cut, []
    monkeypatch.setattr(train.decoded, "cut", lambda *asked: seen.append(asked) or cut(*asked))
    for _ in range(2):
        train.sample(1, RNG)
    assert len(seen) == reads
