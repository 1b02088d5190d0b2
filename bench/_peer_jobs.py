"""The jobs of bench/peers.py: what each is called in diffusers' examples and here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.sources.world import Scenes
from trainer.media.images import to_pil

ENDLESS = 1_000_000  # steps: a program is stopped when it has been measured
PHOTOS, CLASS_IMAGES, PICTURES = 5, 8, 16
CLASS_PROMPT, PROMPT = "a fox on a blue background", "a {} on a blue background"
# of a run that is measured: without what the scripts do not do
BARE = ("preview.every=0", "run.validate_every=0", "run.checkpoint_every=0", f"run.steps={ENDLESS}")
# every picture and every prompt is encoded at each step, as the scripts do, and every loss logged
NOTHING_KEPT = ("run.cache_latents=false", "run.cache_text=false", "run.log_every=1")
SAME = ("optim.schedule=constant", "optim.warmup=0", "optim.clip=1.0", "optim.lr=1e-4",
        "optim.name=adamw", "objective.caption_dropout=0", "tracker=tensorboard")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One job on both sides. images: that a step trains on; script: below the folder of examples;
    theirs: its options; ours: the words of `fit`."""

    script: str
    images: int
    theirs: tuple[str, ...]
    ours: tuple[str, ...]


def make_data(folder: Path, side: int) -> None:
    """Pictures with captions, photos of one thing, and class images, of the embedded world."""
    scenes = Scenes(0, count=PICTURES + PHOTOS + CLASS_IMAGES, sprites="known", side=side)
    kinds = {"pictures": PICTURES, "photos": PHOTOS, "class": CLASS_IMAGES}
    number, rows = 0, []
    for kind, count in kinds.items():
        (folder / kind).mkdir(parents=True)
        for _ in range(count):
            path = folder / kind / f"{number:03}.png"
            to_pil(scenes.image(number)).save(path)
            if kind == "pictures":
                text = scenes.caption(number, np.random.default_rng(number))
                rows.append(json.dumps({"file_name": path.name, "text": text}))
            number += 1
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def jobs(folder: Path, backbone: Path, side: int, batch: int) -> dict[str, Job]:
    """folder: of `make_data`; backbone: a pipeline's folder, `side` pixels wide."""
    both = ("--pretrained_model_name_or_path", str(backbone), "--resolution", str(side))
    common = (*both, "--learning_rate", "1e-4", "--lr_scheduler", "constant", "--lr_warmup_steps",
              "0", "--seed", "0", "--max_train_steps", str(ENDLESS), "--checkpointing_steps",
              str(ENDLESS), "--mixed_precision", "no")  # fmt: skip
    captioned = (*common, "--train_data_dir", str(folder / "pictures"), "--train_batch_size",
                 str(batch))  # fmt: skip
    # a class image stands beside every photo in a batch of theirs
    concept = (*common, "--instance_data_dir", str(folder / "photos"), "--class_data_dir",
               str(folder / "class"), "--class_prompt", CLASS_PROMPT, "--with_prior_preservation",
               "--num_class_images", str(CLASS_IMAGES), "--train_batch_size",
               str(batch // 2))  # fmt: skip
    place = (f"backbone={backbone}", f"run.resolution={side}", f"run.batch_size={batch}", *BARE)
    ours = ("recipe=lora_folder", f"data.folder={folder / 'pictures'}", "data.buckets=0", *place)
    photos = (
        *place, f"data.concept={folder / 'photos'}", "data.class_word=null",
        f"data.prior_folder={folder / 'class'}", f"data.prior_prompts=[{CLASS_PROMPT}]",
    )  # fmt: skip
    full = ("methods.lora=null", "methods.full={}")
    return {
        "lora": Job(
            "text_to_image/train_text_to_image_lora.py",
            batch,
            (*captioned, "--rank", "8"),
            (*ours, *SAME, "methods.lora.rank=8"),
        ),
        "full": Job(
            "text_to_image/train_text_to_image.py", batch, captioned, (*ours, *SAME, *full)
        ),
        "dreambooth_lora": Job(
            "dreambooth/train_dreambooth_lora.py",
            batch,
            (*concept, "--instance_prompt", PROMPT.format("thing"), "--rank", "16"),
            ("recipe=dreambooth_lora", *photos, *SAME, "data.token=thing"),
        ),
        "custom_diffusion": Job(
            "custom_diffusion/train_custom_diffusion.py",
            batch,
            (*concept, "--instance_prompt", PROMPT.format("<new1>"), "--modifier_token", "<new1>",
             "--initializer_token", "thing", "--freeze_model", "crossattn_kv"),
            ("recipe=custom_diffusion", *photos),
        ),
    }  # fmt: skip


def replaced(words: Sequence[str], **options: str | int) -> tuple[str, ...]:
    """The options of a script with other values, as max_train_steps=30."""
    found = list(words)
    for name, value in options.items():
        found[found.index(f"--{name}") + 1] = str(value)
    return tuple(found)


def loss_difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """How far the mean losses of two programs are apart, of theirs. Both draw noise, timesteps and
    order by themselves, so they agree in the mean alone."""
    return abs(ours["loss"] / theirs["loss"] - 1) if theirs["loss"] else float("nan")
