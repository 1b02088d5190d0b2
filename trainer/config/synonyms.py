"""What other trainers call the keys of ours: a message about an unknown key, and `help`, then name
the right one. A word maps to keys of a recipe, and to options of verbs, which have no dot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config.optimisers import CALLED, OPTIMISERS
from trainer.config.schema import KEYS, SECTIONS
from trainer.methods.apply import find_method, method_names

SAMPLING = ("preview", "evaluate")
EPOCHS = ("run.epochs",)
LR, STEPS, SIZE = ("optim.lr",), ("run.steps",), ("run.resolution", "size")
RANK, ALPHA = ("methods.lora.rank",), ("methods.lora.alpha",)
BATCH, OUT, MODEL = ("run.batch_size", "batch"), ("run.out", "out"), ("backbone",)
PRECISION, SEED, COUNT = ("run.precision", "precision"), ("run.seed", "seed"), ("count", "images")
GUIDANCE, SAMPLED = ("preview.guidance", "guidance"), ("preview.steps", "steps")
CAPTION = ("data.token", "data.class_word")
OPTIMISER = ("optim.name",)

SYNONYMS: dict[str, tuple[str, ...]] = {
    # how long and how fast
    "learning_rate": LR, "unet_lr": LR, "base_lr": LR,
    "max_train_steps": STEPS, "max_steps": STEPS, "num_train_steps": STEPS, "iterations": STEPS,
    "num_steps": (*STEPS, "steps"), "num_train_epochs": EPOCHS,
    "max_train_epochs": EPOCHS, "batch": ("run.batch_size",), "batchsize": BATCH,
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": ("run.accumulate",), "accumulation": ("run.accumulate",),
    "lr_scheduler": ("optim.schedule",), "scheduler_type": ("optim.schedule",),
    "lr_warmup_steps": ("optim.warmup",), "warmup_steps": ("optim.warmup",),
    "optimizer": OPTIMISER, "optimizer_type": OPTIMISER,
    "use_8bit_adam": OPTIMISER, "optimizer_name": OPTIMISER, "optim_type": OPTIMISER,
    **dict.fromkeys((*OPTIMISERS, *(word.replace("-", "_") for word in CALLED)), OPTIMISER),
    "max_grad_norm": ("optim.clip",), "gradient_clip_val": ("optim.clip",),
    "adam_weight_decay": ("optim.weight_decay",), "adam_epsilon": ("optim.eps",),
    "adam_beta1": ("optim.betas",), "adam_beta2": ("optim.betas",),
    "use_ema": ("optim.ema",), "ema_decay": ("optim.ema",),
    # on what, and where to
    "size": ("run.resolution",), "image_size": SIZE, "width": SIZE, "height": SIZE,
    "mixed_precision": PRECISION, "dtype": PRECISION, "fp16": PRECISION, "bf16": PRECISION,
    "random_seed": SEED, "manual_seed": SEED,
    "num_workers": ("run.workers",), "dataloader_num_workers": ("run.workers",),
    "output_dir": OUT, "output": OUT, "out_dir": OUT, "save_dir": OUT,
    "run_name": ("run.id",), "output_name": ("run.id",), "exp_name": ("run.id",),
    "resume_from_checkpoint": ("run.id",), "resume": ("run.id",),
    "checkpointing_steps": ("run.checkpoint_every",), "save_steps": ("run.checkpoint_every",),
    "checkpoints_total_limit": ("run.checkpoint_keep",), "logging_steps": ("run.log_every",),
    "num_gpus": ("run.devices",), "num_nodes": ("run.nodes",),
    "cache_latents_to_disk": ("run.cache_latents",), "vae_cache": ("run.cache_latents",),
    "cache_text_encoder_outputs": ("run.cache_text",), "cache_text_embeddings": ("run.cache_text",),
    "report_to": ("tracker",), "log_with": ("tracker",), "logger": ("tracker",),
    "pretrained_model_name_or_path": MODEL, "model": MODEL, "base_model": MODEL, "model_id": MODEL,
    "pretrained_vae_model_name_or_path": ("parts.vae",), "vae_path": ("parts.vae",),
    "ckpt": MODEL,
    # what is learned from which pictures
    "rank": RANK, "lora_rank": RANK, "network_dim": RANK, "lora_r": RANK, "r": RANK,
    "scale": ALPHA, "network_alpha": ALPHA, "lora_alpha": ALPHA,
    "lora_dropout": ("methods.lora.dropout",), "target_modules": ("methods.lora.projections",),
    "placeholder_token": ("data.token",), "modifier_token": ("data.token",),
    "initializer_token": ("methods.new_token.init",),
    "instance_data_dir": ("data.concept",), "instance_prompt": CAPTION,
    "train_data_dir": ("data.folder",), "image_folder": ("data.folder",),
    "class_data_dir": ("data.prior_folder",), "class_prompt": ("data.class_word",),
    "num_class_images": ("data.prior_images",), "prior_loss_weight": ("data.prior_weight",),
    "random_flip": ("data.flip",),
    # the loss
    "snr_gamma": ("objective.min_snr_gamma",), "noise_offset": ("objective.offset_noise",),
    "prediction_type": ("objective.target",), "weighting_scheme": ("objective.weighting",),
    "caption_dropout_rate": ("objective.caption_dropout",),
    # pictures
    "true_cfg_scale": ("preview.true_guidance", "true_guidance"), "distilled_cfg": GUIDANCE,
    "discrete_flow_shift": ("objective.shift",), "flow_shift": ("objective.shift",),
    "guidance_scale": GUIDANCE, "cfg": GUIDANCE, "cfg_scale": GUIDANCE,
    "num_inference_steps": SAMPLED, "sampling_steps": SAMPLED,
    "negative_prompt": ("preview.negative", "negative"), "num_images": COUNT,
    "num_images_per_prompt": COUNT, "num_samples": COUNT,
    "validation_prompt": ("preview.prompts",), "validation_prompts": ("preview.prompts",),
    "sample_prompts": ("preview.prompts",), "sample_every": ("preview.every",),
    "validation_steps": ("preview.every",), "lora_path": ("adapter",),
    "checkpoint": ("adapter",), "video": ("source",), "num_frames": ("frames",),
}  # fmt: skip


def synonym_targets(word: str) -> tuple[str, ...]:
    """The keys and options that a word of another trainer's stands for; none for other words."""
    return SYNONYMS.get(word.lower().replace("-", "_"), ())


def meant_keys(
    word: str, known: Iterable[str], prefix: str, *, values: Mapping[str, Any]
) -> list[str]:
    """The keys that an unknown `word` may have meant where `known` ones stand below `prefix`, empty
    for the top of a recipe and for the options of a verb. values: what was given there; at the top
    of a recipe it names the methods whose options may have been meant."""
    targets, known = synonym_targets(word), set(known)
    here = [name for name in map(_last, targets) if name in known]
    at_home = [t for t in targets if _last(t) in here and _same_home(t, prefix)]
    if at_home:
        return list(dict.fromkeys(f"{prefix}.{_last(t)}" if prefix else t for t in at_home))
    top = known >= set(SECTIONS)
    if not prefix and not top:  # the options of a verb
        return []
    start = f"{prefix}." if top and prefix else ""
    wanted = [t for t in targets if "." in t or t in KEYS]
    return [start + key for t in wanted for key in _of_methods(t, values)]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _same_home(target: str, prefix: str) -> bool:
    """Whether a target stands below `prefix`. One method's option stands for that of all, and an
    option of `sample` for that of the sections about sampling."""
    home = target.rpartition(".")[0]
    if not home and prefix in SAMPLING:
        return True
    return home == prefix or (home.startswith("methods.") and prefix.startswith("methods."))


def _of_methods(target: str, values: Mapping[str, Any]) -> list[str]:
    """A key, or, of a method's option, that of each of the recipe's own methods which has it."""
    if not target.startswith("methods."):
        return [target]
    methods = values.get("methods")
    named = [name for name, own in methods.items() if own is not None] if methods else []
    having = [
        name
        for name in named
        if name in method_names() and _last(target) in find_method(name).model_fields
    ]
    return [f"methods.{name}.{_last(target)}" for name in having] or [target]
