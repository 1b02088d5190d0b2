"""A pipeline folder in diffusers layout, local or fetched from the hub at a pinned commit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from trainer.backbones.spec import BackboneSpec


SCHEDULER = "scheduler_config.json"
STORED = {"F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' names of half precision


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline folder, and perhaps another one whose parts replace its own."""

    path: Path
    overlay: Path | None
    scratch: tuple[str, ...]

    def of(self, part: str) -> Path:
        """The path of a part, or of `model_index.json`."""
        over = self.overlay / part if self.overlay else None
        return over if over is not None and over.exists() else self.path / part

    def index(self, name: str, pipelines: Sequence[str]) -> dict[str, Any]:
        """model_index.json, if it is of one of these pipelines."""
        index: dict[str, Any] = json.loads(self.of("model_index.json").read_text(encoding="utf-8"))
        if index.get("_class_name") not in pipelines:
            raise ValueError(
                f"backbone {name}: {self.of('model_index.json').parent} is a "
                f"{index.get('_class_name')}; this family loads {' and '.join(pipelines)} folders"
            )
        for part, file in (("tokenizer", "tokenizer_config.json"), ("scheduler", SCHEDULER)):
            if not (self.of(part) / file).is_file():
                raise ValueError(_missing(self.of(part), file))
        return index

    def load(self, part: str, kind: Any) -> Any:
        """A part in fp32, or with new random weights where it is to start from scratch."""
        where = self.of(part)
        if not (where / "config.json").is_file():
            raise ValueError(_missing(where, "config.json"))
        if part in self.scratch:
            config = json.loads((where / "config.json").read_text(encoding="utf-8"))
            return kind.from_config(config)
        if not list(where.glob("*.safetensors")):
            found = ", ".join(
                path.name for path in where.glob("*") if path.suffix in (".bin", ".pt", ".ckpt")
            )
            raise ValueError(
                f"{where}: no safetensors "
                f"file{f' (found {found}; pickles are never loaded)' if found else ''}; "
                "save the pipeline with safe_serialization=True"
            )
        ours = kind.__module__.startswith("diffusers.")
        dtype = {"torch_dtype" if ours else "dtype": torch.float32}
        try:
            model, notes = kind.from_pretrained(
                where,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **dtype,
            )
        except SafetensorError as error:
            raise ValueError(f"{where}: its safetensors file is damaged: {error}") from None
        # they would silently stay random
        if missing := sorted(notes["missing_keys"]):
            raise ValueError(
                f"{where}: the weights lack {', '.join(missing[:3])}, {len(missing)} in all; they "
                "do not belong to this config.json"
            )
        return model

    def published(self, part: str) -> torch.dtype:
        """What the weights of a part are stored in; fp32 where it has none, as it starts from
        scratch."""
        files = sorted(self.of(part).glob("*.safetensors"))
        if part in self.scratch or not files:
            return torch.float32
        with safe_open(files[0], "pt") as file:
            kinds = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
        return STORED.get(kinds.most_common(1)[0][0], torch.float32) if kinds else torch.float32

    def scheduler_config(self) -> dict[str, Any]:
        path = self.of("scheduler") / SCHEDULER
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return config


def _missing(where: Path, file: str) -> str:
    return f"{where}: {file} is missing; the folder is not a complete pipeline"


def pipeline_folder(spec: BackboneSpec, name: str, parts: Sequence[str]) -> PipelineFolder:
    """The folder a spec names, fetched first if it is on the hub; parts: those with weights."""
    path = Path(spec.folder) if spec.folder else _download(spec, name, parts)
    return PipelineFolder(path, Path(spec.overlay) if spec.overlay else None, spec.scratch)


def _download(spec: BackboneSpec, name: str, parts: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/*.json", "*/merges.txt", "*/vocab.json", "*/spiece.model"]
    patterns += [f"{part}/*.safetensors" for part in parts]
    try:
        return Path(
            snapshot_download(
                spec.hub,  # type: ignore[arg-type]
                revision=spec.revision,
                allow_patterns=patterns,
                ignore_patterns=["*.fp16.*", "*.non_ema.*", "safety_checker/*"],
            )
        )
    except Exception as error:  # the hub raises a dozen kinds, all for what cannot be fetched
        raise ValueError(
            f"backbone {name}: {spec.hub} could not be fetched ({type(error).__name__}); "
            "download the folder on a "
            f"machine with access and pass backbone=<folder>"
        ) from error
