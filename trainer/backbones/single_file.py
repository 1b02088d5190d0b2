"""Checkpoints in one file, as Stable Diffusion's own code wrote them and user interfaces read them:
which kind one is, by the names and sizes of its tensors, and what it does not hold. No torch.

    model.diffusion_model.*                        the U-Net
    first_stage_model.*                            the VAE
    cond_stage_model.transformer.*                 CLIP of 1.x
    cond_stage_model.model.*                       OpenCLIP of 2.x
    conditioner.embedders.{0.transformer,1.model}.* CLIP and OpenCLIP of XL

How the parts are built, their scheduler and the options of the tokenizers are in `data/layouts/`.
The vocabulary of CLIP is found beside the file or in the cache of the hub, or a user names it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainer.common.atomic import written_atomically
from trainer.common.paths import DATA, cache_folder

LAYOUTS = DATA / "layouts"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_1, CLIP_2 = "cond_stage_model.transformer.", "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER = "conditioner.embedders.0.model."
FIRST = f"{UNET}input_blocks.0.0.weight"
VOCABULARY = ("vocab.json", "merges.txt")
BEGIN = "<|startoftext|>"
# what headers of ModelSpec say a network predicts, and the scheduler's words for it
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class SingleFile:
    """What the header of a file says.

    layout: a folder of `LAYOUTS`; prefixes: of the names of each part's tensors; scheduler: options
    of the noise levels that the file states itself.
    """

    layout: str
    prefixes: Mapping[str, str]
    scheduler: Mapping[str, Any] = field(default_factory=dict)


def is_checkpoint(path: Path) -> bool:
    """Whether a file is such a checkpoint, and no adapter."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return any(name.startswith(UNET) for name in _header(path, path.stat().st_mtime_ns)[0])
    except (SafetensorError, OSError):
        return False


@lru_cache(maxsize=8)
def _header(path: Path, changed: int) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """The shapes of all tensors by name, and the metadata."""
    with safe_open(path, "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return shapes, file.metadata() or {}


def read_single_file(path: Path, layout: str | None = None) -> SingleFile:
    """What kind of checkpoint a file is. layout: what the user says.

    Raises:
        ValueError: it is none that can be trained, or does not say what it predicts.
    """
    shapes, metadata = _header(path, path.stat().st_mtime_ns)
    taken = shapes.get(FIRST, (0, 4))[1]
    if any(name.startswith(REFINER) for name in shapes):
        raise ValueError(f"{path}: the refiner of SDXL, which is not trained here; take the base")
    if "edm_mean" in shapes:
        raise ValueError(f"{path}: trained on EDM's noise levels, which are not known here")
    if FIRST not in shapes or taken != 4:
        raise ValueError(
            f"{path}: its network takes {taken} channels, of a picture or a mask beside the noise; "
            "only models that take noise alone are trained here"
        )
    texts = {
        "sdxl": {"text_encoder": CLIP_XL, "text_encoder_2": OPEN_CLIP_XL},
        "sd21": {"text_encoder": CLIP_2},
        "sd15": {"text_encoder": CLIP_1},
    }
    kinds = [
        kind
        for kind, own in texts.items()
        if any(name.startswith(tuple(own.values())) for name in shapes)
    ]
    kind = kinds[0] if kinds else _by_width(path, shapes, layout)
    scheduler = _stated(shapes, metadata)
    if kind == "sd21" and layout is None:
        if not scheduler:
            raise ValueError(
                f"{path}: a Stable Diffusion 2 that does not say what it predicts; give "
                "parts.config=sd21 for 768 pixels and v, parts.config=sd21_base for 512 pixels "
                "and noise"
            )
        kind = "sd21" if scheduler["prediction_type"] == "v_prediction" else "sd21_base"
    return SingleFile(
        layout or kind, {"unet": UNET, "vae": VAE, **texts[kind.removesuffix("_base")]}, scheduler
    )


def _by_width(path: Path, shapes: Mapping[str, tuple[int, ...]], layout: str | None) -> str:
    """The kind of a file without text encoders, by the width of the text that its U-Net reads, or
    as the user says."""
    ends = ".attn2.to_k.weight"
    width = max((shape[1] for name, shape in shapes.items() if name.endswith(ends)), default=0)
    kinds = {768: "sd15", 1024: "sd21", 2048: "sdxl"}
    if width not in kinds and layout is None:
        reads = f"reads text of width {width}" if width else "reads no text"
        raise ValueError(
            f"{path}: it has no text encoders, and its network {reads}, as none of Stable "
            "Diffusion 1, 2 and XL does; give parts.config=<a pipeline folder of its kind>"
        )
    return kinds.get(width, "sd15")


def _stated(shapes: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of its noise levels: in tensors named `v_pred` and `ztsnr`, as ComfyUI and
    others read them, or in the header of ModelSpec."""
    found: dict[str, Any] = {}
    said = PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in shapes or said:
        found["prediction_type"] = "v_prediction" if "v_pred" in shapes else said
    if "ztsnr" in shapes:
        found["rescale_betas_zero_snr"] = True
    return found


def part_of_file(path: Path, part: str, layout: str) -> str | None:
    """The prefix of a part's tensors; None where the file has none of them."""
    shapes, _ = _header(path, path.stat().st_mtime_ns)
    prefix = read_single_file(path, layout).prefixes.get(part)
    held = prefix is not None and any(name.startswith(prefix) for name in shapes)
    return prefix if held else None


def layout_folder(path: Path, given: str | None) -> Path:
    """The folder that says how the parts of a file are built. given: the name of a layout, or a
    pipeline folder, in the user's words.

    Raises:
        ValueError: there is no such layout or folder, or see `read_single_file`.
    """
    folder = LAYOUTS / (read_single_file(path).layout if given is None else given)
    if given is not None and not (folder / "unet").is_dir():  # the layouts of such checkpoints
        folder = Path(given).expanduser()
        if not (folder / "model_index.json").is_file():
            known = sorted(each.name for each in LAYOUTS.iterdir() if (each / "unet").is_dir())
            raise ValueError(
                f"parts.config={given}: neither one of {', '.join(known)} nor a folder with a "
                "model_index.json"
            )
    return folder


def with_vocabulary(layout: Path, file: Path, given: str | None) -> Path | None:
    """A folder of the tokenizers of a layout with the vocabulary of CLIP, made in the cache; None
    where the layout is a pipeline folder that has its own. given: where the user says it is.

    Raises:
        ValueError: no vocabulary is found.
    """
    tokenizers = sorted(path for path in layout.glob("tokenizer*") if path.is_dir())
    if given is None and all(_vocabulary(path) is not None for path in tokenizers):
        return None
    places = [Path(given).expanduser()] if given else [file.parent, *_kept_by_the_hub()]
    found = (_vocabulary(place / own) for place in places for own in ("tokenizer", "."))
    texts = next((each for each in found if each is not None), None)
    if texts is None:
        where = f"parts.tokenizer={given}" if given else f"backbone={file}"
        raise ValueError(
            f"{where}: no vocabulary of CLIP, vocab.json and merges.txt, is there; a checkpoint in "
            "one file holds none. `hf download openai/clip-vit-large-patch14 vocab.json "
            "merges.txt` fetches one, or give parts.tokenizer=<folder>, the tokenizer of any "
            "Stable Diffusion in diffusers layout"
        )
    digest = hashlib.sha256("\n".join((str(layout), *texts)).encode()).hexdigest()[:16]
    made = cache_folder() / "tokenizers" / f"{layout.name}-{digest}"
    for own in tokenizers:
        (made / own.name).mkdir(parents=True, exist_ok=True)
        more = {path.name: path.read_text(encoding="utf-8") for path in own.glob("*.json")}
        for name, text in (more | dict(zip(VOCABULARY, texts, strict=True))).items():
            if name != "tokenizer.json":
                _keep(made / own.name / name, text)
    return made


def _keep(path: Path, text: str) -> None:
    """Writes a file of the cache, unless it is there and whole."""
    data = text.encode()
    if not (path.is_file() and path.read_bytes() == data):
        with written_atomically(path) as part:
            part.write_bytes(data)


def _vocabulary(place: Path) -> tuple[str, str] | None:
    """The texts of vocab.json and merges.txt of a folder with CLIP's tokenizer, also of one that
    has them in tokenizer.json; None where there are none."""
    try:
        if all((place / name).is_file() for name in VOCABULARY):
            vocab, merges = ((place / name).read_text(encoding="utf-8") for name in VOCABULARY)
        else:
            model = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
            vocab = json.dumps(model["vocab"])
            merges = "\n".join(("#version: 0.2", *pairs)) + "\n"
        return (vocab, merges) if BEGIN in vocab else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _kept_by_the_hub() -> Iterator[Path]:
    """The snapshots in the cache of the hub."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    yield from sorted(cache.glob("models--*/snapshots/*"))
