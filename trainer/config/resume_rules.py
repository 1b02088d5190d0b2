"""What each key of a recipe does when a run resumes with another value than it began with.

A key is applied from the next step on, refused by name, or free: it then changes nothing that is
trained. A key that this table does not name, as an option of a new method or data source, is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from trainer.backbones.spec import PartsSpec
from trainer.config.optimisers import own_betas
from trainer.config.schema import SECTIONS
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names

if TYPE_CHECKING:
    from trainer.config.schema import Recipe

Rule = Literal["applied", "refused", "free", "switch", "place"]
APPLIED: Rule = "applied"  # the new value holds from the next step on, and a line says so
REFUSED: Rule = "refused"  # what the run has become depends on it: another value is another run
FREE: Rule = "free"  # where, how fast, and what is shown; nothing that is trained depends on it
SWITCH: Rule = "switch"  # applied; turning it on or off (null, or an lr of 0) is refused
PLACE: Rule = "place"  # where data lie: free, because their bytes and captions are compared

OUTSIDE: dict[str, Rule] = {
    "recipe": FREE,
    "backbone": REFUSED,
    "denoiser": REFUSED,
    "tracker": FREE,
}
IN_SECTIONS: dict[str, dict[str, Rule]] = {
    "objective": {
        "target": REFUSED,
        "path": REFUSED,
        "timesteps": APPLIED,
        "logit_mean": APPLIED,
        "logit_std": APPLIED,
        "shift": APPLIED,
        "weighting": APPLIED,
        "min_snr_gamma": APPLIED,
        "offset_noise": APPLIED,
        "caption_dropout": APPLIED,
    },
    "optim": {
        "name": REFUSED,
        "lr": APPLIED,
        "muon_lr": APPLIED,
        "scale_lr": APPLIED,
        "lrs": SWITCH,
        "betas": APPLIED,
        "eps": APPLIED,
        "weight_decay": APPLIED,
        "warmup": APPLIED,
        "schedule": APPLIED,
        "final_lr": APPLIED,
        "clip": APPLIED,
        "ema": SWITCH,
    },
    "run": {
        "steps": APPLIED,  # never below the step of the checkpoint, see `runs/resume_check.py`
        "epochs": FREE,  # stored as the steps that they take
        "batch_size": REFUSED,
        "accumulate": REFUSED,
        "seed": REFUSED,
        "resolution": REFUSED,
        "device": FREE,
        "accelerator": FREE,
        "devices": FREE,
        "nodes": FREE,
        "strategy": FREE,
        "precision": REFUSED,
        "base_precision": REFUSED,
        "workers": FREE,
        "gradient_checkpointing": FREE,
        "recompute_every": FREE,
        "offload_activations": FREE,
        "channels_last": FREE,
        "compile": FREE,
        "cache_latents": FREE,  # both round latents alike, see `data/latent_cache.py`
        "cache_text": FREE,  # each prompt is encoded by itself, see `training/text_encodings.py`
        "validate_every": FREE,
        "checkpoint_every": FREE,
        "checkpoint_keep": FREE,
        "keep_adapters": FREE,
        "on_disk_full": FREE,
        "on_nonfinite": APPLIED,
        "nonfinite_in_a_row": APPLIED,
        "nonfinite_total": APPLIED,
        "timeouts": FREE,
        "log_every": FREE,
        "out": FREE,
        "id": FREE,
        "start_from": PLACE,  # its bytes are compared, see `runs/resume_check.py`
    },
    "preview": {
        "prompts": FREE,
        "every": FREE,
        "steps": FREE,
        "scheduler": FREE,
        "guidance": FREE,
        "true_guidance": FREE,
        "temporal_guidance": FREE,
        "seed": FREE,
        "negative": FREE,
        "maps": FREE,
    },
    "evaluate": {
        "steps": FREE,
        "guidance": FREE,
        "true_guidance": FREE,
        "temporal_guidance": FREE,
        "negative": FREE,
        "alone": FREE,
        "beside": FREE,
        "together": FREE,
        "known": FREE,
    },
    "text": {"max_tokens": REFUSED},
    "parts": dict.fromkeys(PartsSpec.model_fields, REFUSED),
    # of the recipe that holds the concepts, compared in `continual.py`; a task's has none of them
    "continual": {
        "concepts": REFUSED,
        "tokens": REFUSED,
        "class_words": REFUSED,
        "inits": REFUSED,
        "images": REFUSED,
        "judge": REFUSED,
    },
}
# drawn anew at each step, as captions are dropped
TAGS: dict[str, Rule] = {"shuffle_tags": APPLIED, "keep_tags": APPLIED}
# which captions and photos there are, compared besides by `data/identity.py`
CAPTIONS: dict[str, Rule] = dict.fromkeys(("recursive", "caption_from", "caption_lines"), REFUSED)
IN_DATA: dict[str, dict[str, Rule]] = {
    "concept": {"concept": PLACE, "prior_folder": PLACE, "on_bad": FREE, **TAGS, **CAPTIONS},
    "folder": {"folder": PLACE, "on_bad": FREE, **TAGS, **CAPTIONS, "repeats": REFUSED},
    "parquet": {"parquet": PLACE, "on_bad": FREE},
    "remote": {"url": PLACE, "on_bad": FREE},
    "shards": {"shards": PLACE, "on_bad": FREE},
    "stream": {"urls": PLACE},
    "video": {"video": PLACE, "stills": PLACE, "on_bad": FREE},
}


@dataclass(frozen=True)
class Change:
    """A key whose value differs from the one a run began with, and the rule for it."""

    key: str
    before: Any
    now: Any
    rule: Rule

    @property
    def settled(self) -> Rule:
        """The rule for these two values: `switch` becomes applied or refused."""
        if self.rule != SWITCH:
            return self.rule
        return APPLIED if _is_on(self.before) == _is_on(self.now) else REFUSED


def rule_of(key: str, source: str = "") -> Rule:
    """The rule for a full key, as `optim.lr` or `data.flip`; source: of the data."""
    section, _, name = key.partition(".")
    if section in IN_SECTIONS:
        return IN_SECTIONS[section].get(name, REFUSED)
    if section == "data":
        return IN_DATA.get(source, {}).get(name, REFUSED)
    return OUTSIDE.get(section, REFUSED)


def changed_keys(stored: Mapping[str, Any], recipe: Recipe) -> list[Change]:
    """Every key in which a stored recipe differs from this one. A key that one of them does not
    give has its default, so that writing a default out is no difference."""
    source = str((recipe.tree.get("data") or {}).get("source", ""))
    before, now = _flat(stored), _flat(recipe.tree)
    found = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    # of another data source or optimiser, and of a method more or less, the options say nothing
    others = tuple(f"{key}." for key in found if key.startswith("methods."))
    others += ("data.",) if "data.source" in found else ()
    others += ("optim.betas",) if "optim.name" in found else ()
    return [
        Change(key, before.get(key), now.get(key), rule=rule_of(key, source))
        for key in found
        if key == "data.source" or not key.startswith(others)
    ]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of a recipe with its plain value, defaults included."""
    flat = {key: tree.get(key) for key in ("backbone", "tracker")}
    flat["tracker"] = flat["tracker"] or "tensorboard"
    flat |= {f"denoiser.{key}": value for key, value in (tree.get("denoiser") or {}).items()}
    chosen = {name: each for name, each in (tree.get("methods") or {}).items() if each is not None}
    for section, cls in SECTIONS.items():
        values = dict(tree.get(section) or {})
        if section == "optim" and values.get("lrs"):  # those of methods that were removed
            values["lrs"] = {name: lr for name, lr in values["lrs"].items() if name in chosen}
        if section == "optim" and values.get("betas") is None:
            values["betas"] = own_betas(values.get("name"))
        flat |= _section(section, cls, values)
    data = dict(tree.get("data") or {})
    flat["data.source"] = source = data.pop("source", None)
    if source in Source.names():
        flat |= _section("data", Source.find(source), data)
    for name, options in chosen.items():
        flat[f"methods.{name}"] = True
        if name in method_names():
            flat |= _section(f"methods.{name}", find_method(name), options)
    return flat


def _section(name: str, cls: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Full keys with plain values. A key of another version of the trainer stays as it was."""
    unknown = {key: value for key, value in values.items() if key not in cls.model_fields}
    own = {key: _plain(cls, key, values) for key in cls.model_fields}
    return {f"{name}.{key}": value for key, value in {**own, **unknown}.items()}


def _plain(cls: type[BaseModel], key: str, values: Mapping[str, Any]) -> Any:
    """A value as JSON has it, the same for all spellings: [0.9, 0.99] and (0.9, 0.99), 1 and 1.0.
    What it names is not looked for: a folder may have moved."""
    field = cls.model_fields[key]
    value = values.get(key, PydanticUndefined)
    if value is PydanticUndefined:
        value = field.get_default(call_default_factory=True)
        if value is PydanticUndefined:
            return None
    adapter = _adapter(cls, key)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError:
        return value


@cache
def _adapter(cls: type[BaseModel], key: str) -> TypeAdapter[Any]:
    field = cls.model_fields[key]
    annotation: Any = field.annotation
    return TypeAdapter(Annotated[(annotation, *field.metadata)] if field.metadata else annotation)


def _is_on(value: Any) -> bool | list[str]:
    """What of a switch is on: whether there is a value, and of rates by name which are 0."""
    if isinstance(value, Mapping):
        return sorted(name for name, rate in value.items() if rate == 0)
    return value is not None
