"""A pipeline folder in diffusers layout, local or fetched from the hub at a pinned commit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.backbones.families import find_family
from trainer.backbones.family import tokenizer_name
from trainer.backbones.prompt_reader import UNLIMITED, length_in
from trainer.backbones.single_file import part_of_file, read_single_file
from trainer.backbones.small_files import cached, fetch_small, remedy, small_files
from trainer.backbones.unfit_folder import (
    building,
    check_config,
    check_files,
    check_index,
    check_loaded,
    missing,
    read_object,
)
from trainer.backbones.unread_tokenizer import has_vocabulary, unread_tokenizer
from trainer.backbones.weight_files import names_to_fetch, weight_files
from trainer.backbones.weight_shapes import check_shapes
from trainer.common import pickles

if TYPE_CHECKING:
    import torch

    from trainer.backbones.family import Family
    from trainer.backbones.spec import BackboneSpec


# what to do with a checkpoint in one file
TO_FOLDER = (
    "give one of Stable Diffusion 1, 2 or XL as backbone=<file>; of another make a folder, with "
    "from_single_file(file).save_pretrained(folder) of its pipeline in diffusers"
)
SCHEDULER = "scheduler_config.json"
TOKENIZER = "tokenizer_config.json"
WITHOUT_VALUES: ContextVar[bool] = ContextVar("without_values", default=False)


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline folder, and perhaps another one whose parts replace its own.

    parts: folders of single parts, which come before both; file: a checkpoint that has the weights
    of all other parts, see `single_file.py`. stored: what the weights are published in, asked for
    where they are not there. denoiser: its name among the parts, None where it is not loaded.
    """

    path: Path
    overlay: Path | None
    scratch: tuple[str, ...]
    parts: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    stored: str | None = None
    denoiser: str | None = None

    @classmethod
    def of_spec(cls, spec: BackboneSpec, path: Path) -> PipelineFolder:
        """That of a spec, whose folder is at `path`."""
        return cls(
            path,
            Path(spec.overlay) if spec.overlay else None,
            spec.scratch,
            parts=spec.parts,
            file=Path(spec.file) if spec.file else None,
            stored=spec.stored,
            denoiser=None if spec.denoiser else find_family(spec.family).denoiser,
        )

    def of(self, part: str) -> Path:
        """The path of a part, or of `model_index.json`."""
        if part in self.parts:
            return Path(self.parts[part])
        over = self.overlay / part if self.overlay else None
        return over if over is not None and over.exists() else self.path / part

    def index(self, name: str, family: Family) -> dict[str, Any]:
        """model_index.json, if it is of a pipeline of the family and names its text encoders."""
        path = self.of("model_index.json")
        index = read_object(path)
        check_index(index, path, name=name, family=family)
        present = encoders_in(index, family)
        for part in family.text_encoders:
            if len(family.text_encoders) > 1 and part not in present + family.optional:
                raise ValueError(
                    f"backbone {name}: its model_index.json names no {part}; this family reads "
                    f"prompts with {' and '.join(family.text_encoders)}, and models that have "
                    "fewer of them, as refiners, are not trained here"
                )
        tokenizers = [(tokenizer_name(part), TOKENIZER) for part in present]
        for part, file in (*tokenizers, ("scheduler", SCHEDULER)):
            if not (self.of(part) / file).is_file():
                raise ValueError(missing(self.of(part), file))
        return index

    def load(self, part: str, kind: Any) -> Any:
        """A part in fp32, or with its layers in half precision inside `reading`; with new
        random weights where it is to start from scratch."""
        from trainer.backbones.stored_in import as_read, read_in

        where = self.of(part)
        if not (where / "config.json").is_file():
            raise ValueError(missing(where, "config.json"))
        config, ours = read_object(where / "config.json"), kind.__module__.startswith("diffusers.")
        if ours:
            check_config(config, where, kind)
        prefix = self.prefix(part)
        if part in self.scratch or WITHOUT_VALUES.get():
            with building(where, config, kind):
                if part in self.scratch:
                    return kind.from_config(config)
                model = _ones(kind, config)
            if ours and prefix is None and "quantization_config" not in config:
                check_shapes(where, model)
            return model
        held = read_in(self, part)
        if prefix is not None and self.file is not None:
            from trainer.backbones.single_file_weights import load_part

            model = load_part(self.file, prefix, kind=kind, where=where, dtype=held)
            return as_read(model, held)
        with building(where, config, kind):
            model, notes = kind.from_pretrained(
                where,
                use_safetensors=True,
                variant=weight_files(where).variant,
                local_files_only=True,
                output_loading_info=True,
                **_options(ours, held),
            )
        check_loaded(where, notes)
        return as_read(model, held)

    def tokenizer(self, kind: Any, text_encoder: str = "text_encoder", **options: Any) -> Any:
        """The tokenizer of a text encoder, of a class of transformers.

        Raises:
            ValueError: its files are damaged.
        """
        where = self.of(tokenizer_name(text_encoder))
        if WITHOUT_VALUES.get() and not has_vocabulary(where):
            return unread_tokenizer(where, self.of(text_encoder))
        try:
            return kind.from_pretrained(where, local_files_only=True, **options)
        except Exception as error:  # tokenizers raises bare ones
            said = " ".join(str(error).split())
            raise ValueError(
                f"{where}: the files of the tokenizer cannot be read ({said}); download them again"
            ) from error

    def published(self, part: str) -> torch.dtype:
        """What the weights of a part are stored in; fp32 where it has none, as it starts from
        scratch."""
        import torch

        from trainer.backbones.stored_in import stored_in

        if part in self.scratch or not self.of(part).is_dir():
            return torch.float32
        if WITHOUT_VALUES.get() and not self.has_weights(part):
            return torch.float32 if self.stored is None else getattr(torch, self.stored)
        kinds = stored_in(self, part)
        return kinds.most_common(1)[0][0] if kinds else torch.float32

    def scheduler_config(self) -> dict[str, Any]:
        path = self.of("scheduler") / SCHEDULER
        config = read_object(path)
        if self.file is None:
            return config
        return config | dict(read_single_file(self.file, self.path.name).scheduler)

    def prefix(self, part: str) -> str | None:
        """Of the part's tensors in the checkpoint; None where its weights are a folder's.

        Raises:
            ValueError: there is a checkpoint that does not hold the part.
        """
        if self.file is None or part in self.parts:
            return None
        found = part_of_file(self.file, part, self.path.name)
        if found is None and part not in self.scratch:
            key = part if part == "vae" or part.startswith("text") else "denoiser"
            raise ValueError(
                f"{self.file}: it holds no {part}; give parts.{key}=<folder>, one in diffusers "
                "layout"
            )
        return found

    def check_weights(self, part: str) -> None:
        """Raises ValueError where a part has no weights that can be loaded, unless none are to be
        read."""
        if WITHOUT_VALUES.get():
            return
        if part not in self.scratch and self.prefix(part) is None:
            check_files(weight_files(self.of(part)).files)

    def has_weights(self, part: str) -> bool:
        """Whether a part has weights that can be loaded."""
        try:
            return self.prefix(part) is not None or bool(weight_files(self.of(part)))
        except ValueError:
            return False


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, parts are loaded with ones in place of their weights, which are not read. A weight's
    ones are one number in memory, so that nothing can be written into it."""
    token = WITHOUT_VALUES.set(True)
    try:
        yield
    finally:
        WITHOUT_VALUES.reset(token)


def _options(ours: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Options of `from_pretrained` that diffusers, `ours`, and transformers have each under names
    of its own; diffusers raises an error itself for weights of other shapes."""
    if ours:
        return {"torch_dtype": dtype}
    return {"dtype": dtype, "ignore_mismatched_sizes": True}


def _ones(kind: Any, config: dict[str, Any]) -> Any:
    import torch

    with torch.device("meta"):
        ours = kind.__module__.startswith("diffusers.")
        model = kind.from_config(config) if ours else kind(kind.config_class.from_dict(config))
    model._apply(lambda value: torch.ones((), dtype=value.dtype).expand(value.shape))
    if not ours:
        model.tie_weights()  # tables that are one have been replaced one by one
    return model


def encoders_in(index: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """The text encoders of a family that a pipeline has; one alone always counts."""
    every = family.text_encoders
    return every if len(every) == 1 else tuple(p for p in every if any(index.get(p) or ()))


def limit_length(tokenizer: Any, encoder: Any) -> None:
    """A tokenizer gives no more tokens than its text encoder has positions, whatever its own files
    say; those of some folders say nothing, which the library takes for 1e30."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    own = length_in(tokenizer.model_max_length)
    known = [length for length in (own, positions) if length is not None]
    tokenizer.model_max_length = min(known, default=UNLIMITED)


def pipeline_folder(spec: BackboneSpec, name: str) -> PipelineFolder:
    """The folder a spec names, fetched first if it is on the hub."""
    if spec.folder is None and WITHOUT_VALUES.get():
        return PipelineFolder.of_spec(spec, small_files(spec, name))
    path = Path(spec.folder) if spec.folder else _download(spec, name)
    return PipelineFolder.of_spec(spec, path)


def parts_to_read(spec: BackboneSpec, folder: Path | None = None) -> list[str]:
    """The parts whose weights are read from the folder of a checkpoint of the hub: not those that
    come from elsewhere or are made here, nor a text encoder that its index does not name. Without
    the folder those of every checkpoint of the family."""
    family = find_family(spec.family)
    encoders = [part for part in family.text_encoders if part not in family.optional]
    if folder is not None:
        encoders = list(encoders_in(read_object(folder / "model_index.json"), family))
    own = [family.denoiser] if spec.denoiser is None else []
    others = (*spec.parts, *spec.scratch)
    return [part for part in (*own, *encoders, *family.vae_parts) if part not in others]


def _download(spec: BackboneSpec, name: str) -> Path:
    """The folder of a checkpoint of the hub, from the cache where it is complete."""
    from huggingface_hub import HfApi, snapshot_download

    hub, revision = str(spec.hub), spec.revision
    if (kept := kept_folder(spec)) is not None:
        return kept
    with _asking(spec, name):
        every = HfApi().list_repo_files(hub, revision=revision)
    weights_to_fetch(every, parts_to_read(spec), hub=hub)  # refused before anything is fetched
    with _asking(spec, name):
        folder = fetch_small(hub, revision)  # before the weights, so that where these are, all is
    weights = weights_to_fetch(every, parts_to_read(spec, folder), hub=hub)
    with _asking(spec, name):
        if weights:
            snapshot_download(hub, revision=revision, allow_patterns=weights)
    return folder


@contextmanager
def _asking(spec: BackboneSpec, name: str) -> Iterator[None]:
    """Around what the hub is asked for."""
    try:
        yield
    except Exception as error:  # the hub raises a dozen kinds, all for what cannot be fetched
        raise ValueError(
            f"backbone {name}: {spec.hub} could not be fetched ({type(error).__name__}); "
            f"{remedy(error, spec)}; or download the folder on a machine with access and pass "
            "backbone=<folder>"
        ) from error


def kept_folder(spec: BackboneSpec) -> Path | None:
    """The folder of a checkpoint of the hub in its cache; None if a file that is read is missing. A
    pinned commit never changes."""
    if (folder := cached(spec)) is None:
        return None
    try:
        for part in parts_to_read(spec, folder):
            weight_files(folder / part)
    except ValueError:
        return None
    return folder


def weights_to_fetch(every: Iterable[str], parts: Sequence[str], hub: str) -> list[str]:
    """Of all files of a repository, `hub`, the weights of these parts: in full precision where they
    are, else those of the one variant that `weight_files` takes.

    Raises:
        ValueError: those of a part are pickles alone.
    """
    found = []
    for part in parts:
        inside = [path.partition("/")[2] for path in every if path.startswith(f"{part}/")]
        own = names_to_fetch(inside)
        if not own and (others := [name for name in inside if name.endswith(pickles.SUFFIXES)]):
            raise ValueError(
                f"{hub}: {part} has no safetensors file (found {', '.join(others)}; pickles are "
                "never loaded); take a repository or a revision that has one"
            )
        found += [f"{part}/{each}" for each in own]
    return found
