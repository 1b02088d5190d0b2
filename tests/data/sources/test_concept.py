"""Concepts: one or several at once, each with its token, beside class images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.config.load import load_recipe
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data.concept_photos import held_out_of
from trainer.data.identity import sha256_of_file
from trainer.data.loader import collate
from trainer.data.plan import Slot, StepPlan
from trainer.data.source import Generation, Needs
from trainer.data.sources.concept import Concept
from trainer.media.images import resize_cover, to_tensor


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two folders of photographs, three of a red thing and four of a blue one."""
    made = []
    for name, colour, count in (("red", (200, 0, 0), 3), ("blue", (0, 0, 200), 4)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            Image.new("RGB", (40, 30), colour).save(folder / f"{number}.png")
        made.append(folder)
    return made


def opened(tmp_path: Path, **options: Any) -> Any:
    def paint(prompts: Any, seed: int, how: Generation) -> Any:
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    source = Concept(augment=False, **options)
    return source.open(Needs(32, 4, paint, tmp_path / "cache", lambda: "tiny"))


def test_several_concepts_share_half_of_every_batch(folders: list[Path], tmp_path: Path) -> None:
    train, _ = opened(
        tmp_path,
        concept=[str(folder) for folder in folders],
        token=["<v1>", "<v2>"],
        class_word=["mug", "cat"],
        prior_images=6,
    )
    assert [len(group) for group in train.groups] == [3, 4, 6]
    assert list(train.shares) == [0.25, 0.25, 0.5]
    assert list(train.weights) == [0.5, 0.5, 1.0]
    groups = tuple((group.start, group.stop) for group in train.groups)
    plan = StepPlan(groups, tuple(train.shares), tuple(train.weights), 8, 0)
    assert plan.counts() == [2, 2, 4]
    # loss = mean over concepts of their means + the class images' mean
    assert sum(slot.weight for slot in plan.batch(0)) == pytest.approx(8 * 2.0)


def test_class_images_are_of_the_seed_and_guidance_asked_for(
    folders: list[Path], tmp_path: Path
) -> None:
    def keys(**options: Any) -> set[str]:
        opened(tmp_path, concept=str(folders[0]), class_word="mug", prior_images=2, **options)
        return {path.name for path in (tmp_path / "cache" / "prior").iterdir()}

    first = keys()
    assert keys() == first
    other = keys(prior_seed=1)
    assert len(other - first) >= 1
    seen = keys(prior_guidance=1.5)
    assert len(seen - other) >= 1
    for option in ({"prior_steps": 7}, {"prior_sampler": "dpmpp"}):
        more = keys(**option)
        assert len(more - seen) == 1, option
        seen = more


def test_each_concept_is_captioned_with_its_own_token(folders: list[Path], tmp_path: Path) -> None:
    train, _ = opened(
        tmp_path,
        concept=[str(folder) for folder in folders],
        token=["<v1>", "<v2>"],
        class_word=["mug", "cat"],
        prior_images=4,
    )
    rng = np.random.default_rng(0)
    captions = [train.caption(index, rng) for index in range(len(train))]
    assert all("<v1> mug" in caption for caption in captions[:3])
    assert all("<v2> cat" in caption for caption in captions[3:7])
    assert captions[7:] == ["a photo of a mug", "a photo of a cat"] * 2
    red, blue = train.image(0), train.image(3)
    assert red[0].mean() > 0.5 > red[2].mean()
    assert blue[2].mean() > 0.5 > blue[0].mean()


def test_sprites_can_be_several_too(tmp_path: Path) -> None:
    train, held_out = opened(
        tmp_path, concept=["sprite:penguin", "sprite:owl"], token=["<a>", "<b>"], prior_weight=0
    )
    assert [len(group) for group in train.groups] == [5, 5]
    assert held_out is not None
    assert len(held_out) == 32
    rng = np.random.default_rng(0)
    assert "<a>" in train.caption(0, rng)
    assert "<b>" in train.caption(5, rng)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"token": "<v1>"}, "give each a different one", id="one token"),
        pytest.param({"token": ["<v1>", "<v1>"]}, "give each a different one", id="same token"),
        pytest.param({"class_word": ["mug"]}, "give one for each", id="one class word"),
        pytest.param({"concept": []}, "the list is empty", id="no concept"),
        pytest.param({"concept": ["sprite:penguin", "sprite:owll"]}, "did you mean owl", id="typo"),
    ],
)
def test_lists_that_do_not_agree_are_refused(changes: dict[str, Any], message: str) -> None:
    tree = {
        "concept": ["sprite:penguin", "sprite:owl"],
        "token": ["<v1>", "<v2>"],
        "prior_weight": 0,
    }
    with pytest.raises(RecipeError) as error:
        build_section(Concept, tree | changes, "data")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("word", "alone"),
    [("a dog", "dog"), ("An old mug", "old mug"), ("the cat", "cat"), ([" A  dog", "cat"], "dog")],
)
def test_a_class_word_with_an_article_is_refused(word: str | list[str], alone: str) -> None:
    """It would be learned as "a <v1> a dog"."""
    tree: dict[str, Any] = {"concept": "sprite:penguin"}
    if isinstance(word, list):
        tree = {"concept": ["sprite:penguin", "sprite:owl"], "token": ["<v1>", "<v2>"]}
    says = f"has an article.*'a photo of a <v1> {alone}'; write {alone} alone"
    with pytest.raises(RecipeError, match=says):
        build_section(Concept, {**tree, "class_word": word}, "data")
    build_section(Concept, {"concept": "sprite:penguin", "class_word": "anthill"}, "data")
    prompts = ["a fox", "the cat"]  # which are whole texts
    build_section(
        Concept,
        {"concept": "sprite:penguin", "class_word": "cat", "prior_prompts": prompts},
        "data",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"class_word": ""},
        {"class_word": " "},
        {"class_word": ["mug", " "]},
        {"prior_prompts": [""]},
        {"prior_prompts": ["a fox", " "]},
    ],
)
def test_blank_words_are_refused(options: dict[str, Any]) -> None:
    several = isinstance(options.get("class_word"), list)
    own = {"concept": ["sprite:penguin", "sprite:owl"], "token": ["<v1>", "<v2>"]}
    tree = own if several else {"concept": "sprite:penguin"}
    with pytest.raises(RecipeError, match=r"it is blank; write words"):
        build_section(Concept, {**tree, "class_word": "bird", **options}, "data")


def test_holding_all_photos_out_is_refused_before_any_is_opened(folders: list[Path]) -> None:
    tree = {"concept": str(folders[0]), "class_word": "mug", "prior_weight": 0}
    with pytest.raises(RecipeError, match=r"validation=3 holds out all 3 photos in .*; give at mo"):
        build_section(Concept, {**tree, "validation": 3}, "data")
    held = [build_section(Concept, {**tree, "validation": n}, "data").holds_out for n in (0, 2)]
    assert held == [False, True]


def test_class_images_are_painted_once_for_each_sampler(tmp_path: Path) -> None:
    asked: list[float] = []

    def paint(prompts: Any, seed: int, how: Generation) -> Any:
        asked.append(how.guidance)
        return [Image.new("RGB", (32, 32)) for _ in prompts]

    def open_with(painter: str, guidance: float, sampled: str = "") -> None:
        source = Concept(
            concept="sprite:penguin",
            prior_images=1,
            prior_prompts=("a fox",),
            prior_guidance=guidance,
        )
        source.open(Needs(32, 4, paint, tmp_path, lambda: painter, sampled=sampled))

    for painter, guidance in (("a", 1.0), ("a", 1.0), ("a", 2.0), ("a", 2.0), ("b", 1.0)):
        open_with(painter, guidance)
    assert asked == [1.0, 2.0, 1.0]
    open_with("a", 1.0, "another schedule of the noise")
    assert asked == [1.0, 2.0, 1.0, 1.0]


def words_of(folders: list[Path], **options: Any) -> list[str]:
    """The captions of the class images."""
    train, _ = opened(folders[0].parent, concept=[str(each) for each in folders],
                      token=["<v1>", "<v2>"], **options)  # fmt: skip
    rng = np.random.default_rng(0)
    return [train.caption(index, rng) for index in train.groups[2]]


def test_each_folder_of_class_images_has_the_captions_of_its_concept(
    folders: list[Path], tmp_path: Path
) -> None:
    """Two concepts gave every class image the first one's kind."""
    others = []
    for name in ("mugs", "apes"):
        others.append(tmp_path / name)
        others[-1].mkdir()
        for number in range(2):
            Image.new("RGB", (32, 32)).save(others[-1] / f"{number}.png")
    (others[1] / "1.txt").write_text("two apes in a tree")
    both = {"prior_folder": [str(each) for each in others], "class_word": ["mug", "ape"]}
    assert words_of(folders, **both) == [
        "a photo of a mug", "a photo of a mug", "a photo of an ape", "two apes in a tree",
    ]  # fmt: skip
    said = "nothing says what 0.png shows"
    with pytest.raises(ValueError, match=said):  # of which concept?
        words_of(folders, prior_folder=str(others[0]), class_word=["mug", "ape"])
    with pytest.raises(ValueError, match=said):
        words_of(folders, prior_folder=both["prior_folder"], class_word=None)
    one = {"prior_folder": str(others[0]), "class_word": ["mug", "ape"]}
    assert words_of(folders, **one, prior_prompts=("a cup",)) == ["a cup", "a cup"]
    for number in range(2):
        (others[0] / f"{number}.txt").write_text(f"cup {number}")
    assert words_of(folders, **one) == ["cup 0", "cup 1"]
    (others[0] / "1.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"nothing says what 1\.png shows"):
        words_of(folders, **one)


def test_prompts_of_class_images_name_each_kind(folders: list[Path]) -> None:
    found = words_of(
        folders, class_word=["mug", "ape"], prior_images=4,
        prior_prompts=("a {class} outside", "a fox"),
    )  # fmt: skip
    assert found == ["a mug outside", "an ape outside", "a fox", "a mug outside"]


def test_photos_need_to_be_told_what_they_show(folders: list[Path]) -> None:
    """A cup was taught as "a <v1> animal"."""
    with pytest.raises(ValueError, match=r"class_word is missing.*red shows, as in data\.class_w"):
        Concept(concept=str(folders[0]), prior_weight=0)
    with pytest.raises(RecipeError, match=r"^data: class_word is missing"):
        load_recipe(["recipe=lora", "backbone=sd15", f"data.concept={folders[0]}"])
    assert Concept(concept=str(folders[0]), prior_weight=0, class_word=None).kinds == ()
    for word, phrase in (("owl", "an owl"), ("cup", "a cup"), ("unicorn", "a unicorn")):
        made = load_recipe(
            [
                "recipe=lora",
                "backbone=sd15",
                f"data.concept={folders[0]}",
                f"data.class_word={word}",
            ]
        )
        assert made.data.class_prompts == [f"a photo of {phrase}"]  # type: ignore[attr-defined]
        assert f"a <v1> {word} on a beach" in made.preview.prompts


def painted(folder: Path, name: str, box: tuple[int, int, int, int]) -> None:
    """A mask of the photos of `folders`, white in a box of pixels."""
    mask = Image.new("L", (40, 30))
    mask.paste(255, box)
    mask.save(folder / name)


def test_a_mask_beside_a_photo_weighs_its_loss(folders: list[Path], tmp_path: Path) -> None:
    """It was trained on as a photo."""
    painted(folders[0], "0_mask.png", (0, 0, 20, 30))  # the left half
    options = {"concept": str(folders[0]), "class_word": "mug", "prior_weight": 0}
    source = Concept(augment=False, **options)
    train, _ = source.open(Needs(32, 4, no_images, tmp_path, lambda: "tiny"))
    assert len(train) == 3
    masks = [train.sample(i, np.random.default_rng(0)).mask for i in range(3)]
    assert masks[1] is None and masks[2] is None
    assert masks[0] is not None and masks[0].shape == (1, 8, 8)
    assert masks[0][0, :, :4].min() == 1 and masks[0][0, :, 4:].max() == 0
    batch = collate(train, [Slot(0, 0, 1.0), Slot(1, 1, 1.0)], step=0, seed=0, moments=None)
    cached = collate(
        train, [Slot(0, 0, 1.0), Slot(1, 1, 1.0)], step=0, seed=0,
        moments=np.zeros((3, 4, 8, 8), np.float16),
    )  # fmt: skip
    for made in (batch, cached):
        assert made.masks is not None
        assert made.masks[0].equal(masks[0]) and made.masks[1].min() == 1
    mirrored = Concept(augment=False, flip=True, **options).open(
        Needs(32, 4, no_images, tmp_path, lambda: "tiny")
    )[0]
    seen = [mirrored.sample(0, np.random.default_rng(seed)).mask for seed in range(20)]
    assert {bool(mask[0, 0, 0]) for mask in seen if mask is not None} == {True, False}


def test_an_augmented_photo_is_learned_where_its_mask_is_white(
    folders: list[Path], tmp_path: Path
) -> None:
    """A red photo whose left half is blue, and masked: what counts in a view is red alone."""
    photo = Image.new("RGB", (40, 30), (200, 0, 0))
    photo.paste((0, 0, 200), (0, 0, 20, 30))
    photo.save(folders[0] / "0.png")
    painted(folders[0], "0.mask.png", (20, 0, 40, 30))
    source = Concept(concept=str(folders[0]), class_word="mug", prior_weight=0, flip=True)
    train, _ = source.open(Needs(64, 4, no_images, tmp_path, lambda: "tiny"))
    for seed in range(60):
        sample = train.sample(0, np.random.default_rng(seed))
        assert sample.mask is not None and 0 < float(sample.mask.sum()) < 256
        counts = (sample.mask[0] == 1).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert float((sample.image[2] * counts).max()) <= 0, seed  # no blue; 0 is the grey around


def no_images(prompts: Any, seed: int, how: Generation) -> Any:
    raise AssertionError("no class images are asked for")


@pytest.mark.parametrize(
    ("count", "asked", "kept"),
    [(4, None, 0), (5, None, 1), (9, None, 1), (6, 0, 0), (6, 2, 2), (3, 1, 1)],
)
def test_photos_are_held_out_for_validation(
    count: int, asked: int | None, kept: int, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(folder / f"{number}.png")
    train, held_out = opened(
        tmp_path, concept=str(folder), class_word="dog", prior_images=2, validation=asked
    )
    names = [f"{number}.png" for number in range(count)]
    assert [pair.key for pair in train.pairs[: train.num_photos]] == names[: count - kept]
    found = [] if held_out is None else [pair.key for pair in held_out.pairs]
    assert found == names[count - kept :]


def test_a_photo_is_left_to_train_on(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"validation=3 holds out all 3 photos"):
        opened(tmp_path, concept=str(folders[0]), class_word="dog", prior_weight=0, validation=3)


def test_class_images_are_made_as_ever_by_default() -> None:
    """The numbers of Custom Diffusion, and 25 steps at guidance 5; what is cached rests on them."""
    source = Concept(concept="sprite:penguin", class_word="bird")
    made = source.model_dump(include={"prior_images", "prior_weight", "prior_seed", "prior_steps"})
    assert made == {
        "prior_images": 200, "prior_weight": 1.0, "prior_seed": 0, "prior_steps": 25,
    }  # fmt: skip
    assert (source.prior_guidance, source.prior_sampler, source.validation) == (5.0, None, None)


def test_captions_of_every_kind_hold_the_token(folders: list[Path], tmp_path: Path) -> None:
    red = folders[0]
    (red / "0.caption").write_text("a <v1>, red, small\na <v1>, on a table, near")
    row = '{"file_name": "1.png", "text": "the <v1> itself"}'
    (red / "metadata.jsonl").write_text(row)
    options = {"concept": str(red), "class_word": "mug", "prior_weight": 0, "caption_lines": True}
    source = Concept(**options, augment=False)
    texts = [text for _, text, _ in source.captions()]
    assert texts[:3] == ["a <v1>, red, small", "a <v1>, on a table, near", "the <v1> itself"]
    train, _ = opened(tmp_path, **options, shuffle_tags=True, keep_tags=1)
    seen = {train.caption(0, np.random.default_rng(n)) for n in range(60)}
    assert seen == {
        "a <v1>, red, small", "a <v1>, small, red",
        "a <v1>, on a table, near", "a <v1>, near, on a table",
    }  # fmt: skip
    assert source.found() == [
        f"{red}: 3 photos; captions: 1 from .caption, 1 from metadata.jsonl, 1 from a template ("
        "photos with several: 1); masks: none"
    ]
    (red / "0.caption").write_text("a <v1>\na mug")
    with pytest.raises(ValueError, match=r"0\.caption: the caption must contain the token <v1>"):
        opened(tmp_path, **options)


def test_numbers_of_folders_repeat_no_photo_of_a_concept(tmp_path: Path) -> None:
    """Each photo of a concept is taken as often as the others, and nothing else is said."""
    for name in ("10_dog", "3_cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "0.png")
    (said,) = Concept(concept=str(tmp_path), class_word="dog", prior_weight=0).found()
    assert said == f"{tmp_path}: 2 photos; captions: 2 from a template; masks: none"


def test_photos_in_subfolders_of_a_concept(folders: list[Path], tmp_path: Path) -> None:
    options = {"concept": str(tmp_path), "class_word": None, "prior_weight": 0, "validation": 0}
    with pytest.raises(ValueError, match=r"no image in this folder.*data\.recursive=true"):
        opened(tmp_path, **options)
    train, _ = opened(tmp_path, **options, recursive=True)
    assert [train.key(i) for i in range(7)][::3] == ["blue/0.png", "blue/3.png", "red/2.png"]


def test_large_photos_are_kept_in_the_size_that_is_trained(tmp_path: Path) -> None:
    """As large as augmentation looks at them, with their masks; small ones as they are."""
    folder = tmp_path / "cup"
    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    large = smooth.resize((1800, 1350), Image.Resampling.BICUBIC)
    large.save(folder / "large.png")
    noise.save(folder / "small.png")
    mask = Image.new("L", large.size)
    mask.paste(255, (0, 0, 900, 1350))
    mask.save(folder / "large_mask.png")
    options = {"concept": str(folder), "class_word": "cup", "prior_weight": 0, "validation": 0}
    sizes = {}
    for augment in (False, True):
        source = Concept(augment=augment, **options)
        train, _ = source.open(Needs(32, 4, no_images, tmp_path / "cache", lambda: "tiny"))
        sizes[augment] = [pair.image.size for pair in train.pairs]
        assert train.pairs[0].mask.size == train.pairs[0].image.size
        assert train.pairs[0].identity().startswith(sha256_of_file(folder / "large.png")[:8])
        wanted = to_tensor(resize_cover(large, 32))
        gap = (train.image(0) - wanted).abs().max()
        assert gap == 0 if not augment else gap < 0.05
        half = torch.ones(8, 1) * (torch.arange(8) < 4)
        torch.testing.assert_close(train.loss_mask(0)[0], half, rtol=0, atol=0.05)
    assert sizes == {False: [(32, 32), (40, 30)], True: [(44, 44), (40, 30)]}
    assert len(list((tmp_path / "cache").rglob("*.png"))) == 2


def test_large_class_images_are_kept_small_too(folders: list[Path], tmp_path: Path) -> None:
    prior = tmp_path / "prior"
    prior.mkdir()
    Image.new("RGB", (1600, 1500), (9, 99, 9)).save(prior / "a.png")
    train, _ = opened(
        tmp_path, concept=str(folders[0]), class_word="cup", prior_folder=prior, validation=0
    )
    assert [pair.image.size for pair in train.pairs] == [(40, 30)] * 3 + [(32, 32)]


@pytest.mark.parametrize(
    ("photos", "asked", "held_out"),
    [(4, None, 0), (5, None, 1), (20, None, 1), (5, 0, 0), (4, 2, 2)],
)
def test_one_of_five_photos_is_held_out(photos: int, asked: int | None, held_out: int) -> None:
    assert held_out_of(photos, asked) == held_out
