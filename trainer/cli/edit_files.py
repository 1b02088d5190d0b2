"""What `edit` makes and writes: the sheet, the edits, and the JSON that says how they were made."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cli.given_adapter import (
    facts_of_given,
    given_adapter,
    load_bare,
    load_given,
    parts_of,
)
from trainer.cli.prompt_file import filled
from trainer.cli.repeat_picture import RepeatedPicture, compare_parts
from trainer.cli.sample_files import check_fit
from trainer.cli.sample_source import file_facts, image_of
from trainer.common.paths import slug

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from trainer.backbones.backbone import Backbone
    from trainer.cli.edit_options import EditOptions
    from trainer.diffusion.image_edit import EditedPictures, EditJob, Inverted
    from trainer.diffusion.sampling_settings import Sampling
    from trainer.methods.method import Method

FILES = ("image", "mask", "target_mask", "reference")


def written_edits(
    options: EditOptions, chosen: Mapping[str, Method], earlier: RepeatedPicture | None
) -> tuple[list[Path], dict[str, Any]]:
    """The files, and what the JSON says."""
    from trainer.diffusion.image_edit import edit_pictures
    from trainer.media.images import to_pil
    from trainer.media.made_by import png_bytes
    from trainer.media.write_video import write_once

    backbone, tree, facts = _model(options, chosen, earlier)
    given = None if options.image is None else _picture(backbone, options, "image")
    job = _job(backbone, options, tree, given=given)
    made = edit_pictures(backbone, job)
    edits = [to_pil(picture) for picture in made.pictures.cpu()]
    facts |= {
        "edits": [
            {"prompt": prompt, "pixels_sha256": hashlib.sha256(edit.tobytes()).hexdigest()}
            for prompt, edit in zip(job.rows[0], edits, strict=True)
        ],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    files = {".png": png_bytes(_sheet(job, made, given=given, edits=edits))}
    files |= {f"-edit{n}.png": png_bytes(edit) for n, edit in enumerate(edits, start=1)}
    files[".json"] = (json.dumps(facts, indent=2) + "\n").encode()
    return write_once(files, options.out / f"{slug(job.prompts[0])}-{options.seed}"), facts


def _model(
    options: EditOptions, chosen: Mapping[str, Method], earlier: RepeatedPicture | None
) -> tuple[Backbone, Mapping[str, Any], dict[str, Any]]:
    """The model with its methods, the recipe of the adapter, and what the JSON says of both."""
    from trainer.backbones.device import choose_placement

    say = partial(print, file=sys.stderr)
    paths = [] if options.adapter is None else [options.adapter]
    given = [given_adapter(path, options.backbone, say) for path in paths]
    parts = parts_of(given, options.backbone)
    if earlier is not None:
        compare_parts(earlier, parts)
    placement = choose_placement(options.device, options.precision, lean=True)
    tree: Mapping[str, Any] = {}
    if given:
        own: Any = {"placement": placement, "methods": options.methods or {}}
        backbone, tree = load_given(given, [options.scale], options.backbone, **own)
    else:
        backbone = load_bare(str(options.backbone), chosen, placement)
    facts = {"options": _said(options, chosen), "backbone_parts": parts} | _made_with(backbone)
    facts |= facts_of_given(given, [options.scale])
    for key in FILES:
        facts |= file_facts(key, getattr(options, key))
    return backbone, tree, facts


def _made_with(backbone: Backbone) -> dict[str, Any]:
    """What the last bits depend on beside the options."""
    from trainer.common.version import name_and_version
    from trainer.diffusion.made_of import last_bits
    from trainer.diffusion.sampling_settings import Sampling

    found = {
        "backbone": backbone.name,
        "device": backbone.device.type,
        "computes_in": str(backbone.computes_in).removeprefix("torch."),
        "version": name_and_version(),
        **last_bits(backbone, Sampling()),
    }
    return {key: value for key, value in found.items() if value is not None}


def _said(options: EditOptions, chosen: Mapping[str, Method]) -> dict[str, Any]:
    """The options as they would be given again, those of methods complete."""
    found = options.model_dump(mode="json", by_alias=True, exclude_none=True)
    found = {key: value for key, value in found.items() if key not in ("out", "recipe", "method")}
    if options.adapter is not None:  # beside its own methods, which are complete in its header
        return found
    whole = {name: method.model_dump(mode="json") for name, method in chosen.items()}
    return found | {"methods": whole}


def _job(
    backbone: Backbone,
    options: EditOptions,
    tree: Mapping[str, Any],
    *,
    given: Tensor | None,
) -> EditJob:
    """given (1, 3, H, W): the picture to edit."""
    from trainer.diffusion.edit_source import source_branch
    from trainer.diffusion.image_edit import EditJob
    from trainer.diffusion.sampler import check_hooks

    texts = [("prompt", text) for text in options.prompts]
    *prompts, source, negative = filled(
        [*texts, ("source", options.source or ""), ("negative", options.negative)], backbone, tree
    )
    settings = _settings(options, negative)
    check_fit(backbone, settings)
    branch = source_branch(backbone)
    _check_read(backbone, options)
    check_hooks(backbone, settings, edits=True)
    masks = _masks(backbone, options)
    other = None if options.reference is None else _picture(backbone, options, "reference")
    inverted = [
        None if picture is None else _inverted(backbone, picture, text, settings=settings)
        for picture, text in ((given, source), (other, ""))
    ]
    return EditJob(
        prompts,
        source if branch is not None else None,
        seed=options.seed,
        settings=settings,
        inverted=inverted[0],
        reference=inverted[1],
        between=options.between or 0,
        masks=masks,
        maps=options.maps,
    )


def _inverted(backbone: Backbone, picture: Tensor, text: str, *, settings: Sampling) -> Inverted:
    from trainer.common.long_work import long_work
    from trainer.diffusion.image_edit import invert_picture

    with long_work("inversion", settings.steps) as advance:
        return invert_picture(backbone, picture, text, settings=settings, advance=advance)


def _check_read(backbone: Backbone, options: EditOptions) -> None:
    """Raises ValueError for what no method reads, or what one is not given."""
    from trainer.diffusion.edit_source import source_branch

    branch = source_branch(backbone)
    names = ", ".join(f"methods.{name}" for name in backbone.sampling_hooks) or "this model"
    masks = () if branch is None else branch[1].masks
    read = {
        "source": branch is not None,
        "image": branch is not None,
        "mask": "source" in masks,
        "target_mask": "target" in masks,
        "reference": branch is not None and branch[1].refers,
        "between": any(hook.between for hook in backbone.hooks),
    }
    for key, reads in read.items():
        if getattr(options, key) and not reads:
            raise ValueError(f"{key}= is not read by {names}; leave it out")
    if read["between"] and options.between is None:
        raise ValueError(
            f"{names} makes pictures between two; give both prompts, and how many are between "
            "them, as in prompt=['a fox', 'a cat'] between=5"
        )
    if branch is not None and options.source is None and options.image is None:
        raise ValueError(
            f'methods.{branch[0]} edits a source; say what it shows, as in source="a cat" or '
            'prompt="a [cat->dog]", or give image=<a picture>'
        )


def _settings(options: EditOptions, negative: str) -> Sampling:
    from trainer.diffusion.sampling_settings import Sampling

    size = None if options.size is None else (options.size, options.size)
    return Sampling(options.steps, options.guidance, negative, size=size)


def _side(backbone: Backbone, options: EditOptions) -> int:
    return int(options.size or backbone.resolution)


def _picture(backbone: Backbone, options: EditOptions, key: str) -> Tensor:
    """(1, 3, H, W) of the file that an option names."""
    from trainer.media.images import upright_size

    path: Path = getattr(options, key)
    side = _side(backbone, options)
    size = upright_size(path.expanduser())
    if min(size) < backbone.multiple:
        raise ValueError(
            f"{key}={path} is {size[0]}x{size[1]}, and the smallest picture of this backbone has a "
            f"side of {backbone.multiple}; give a larger one"
        )
    if key != "image":
        _check_size(key, path, size, wanted=_size(options, side))
    return image_of(path, (side, side), 1.0).pixels


def _size(options: EditOptions, side: int) -> tuple[int, int]:
    """Width and height of the picture that is edited, of so long a side where it is generated."""
    from trainer.media.images import upright_size

    return (side, side) if options.image is None else upright_size(options.image.expanduser())


def _check_size(key: str, path: Path, size: tuple[int, int], *, wanted: tuple[int, int]) -> None:
    """Raises ValueError for a picture beside the one that is edited, of another size."""
    if size != wanted:
        raise ValueError(
            f"{key}={path} is {size[0]}x{size[1]}, and the picture {wanted[0]}x{wanted[1]}; give "
            "one of the same size"
        )


def _masks(backbone: Backbone, options: EditOptions) -> dict[str, Tensor]:
    """Of the source and the edit (1, 1, H, W), cut as the picture is."""
    if options.mask is None:
        return {}
    side = _side(backbone, options)
    source = target = _mask(options, "mask", side)
    if options.target_mask is not None:
        target = _mask(options, "target_mask", side)
    return {"source": source, "target": target}


def _mask(options: EditOptions, key: str, side: int) -> Tensor:
    import torch

    from trainer.media.images import cover, read_image, to_tensor

    path: Path = getattr(options, key)
    picture = read_image(path.expanduser())
    _check_size(key, path, picture.size, wanted=_size(options, side))
    grey = to_tensor(cover(picture, (side, side)))[None].mean(1, keepdim=True)
    return (grey > 0).to(torch.float32)


def _sheet(
    job: EditJob, made: EditedPictures, *, given: Tensor | None, edits: list[Image]
) -> Image:
    from trainer.media.contact_sheet import Strip, contact_sheet
    from trainer.media.images import to_pil

    first: dict[str, Tensor] = {} if given is None else {"source": given[0]}
    if made.source is not None:
        first["source" if given is None else "again"] = made.source[0].cpu()
    for name, mask in job.masks.items():
        if name == "source" or mask is not job.masks["source"]:
            first[f"{name} mask"] = mask[0].expand(3, -1, -1) * 2 - 1
    strips = []
    if first:
        pictures = [_small(to_pil(own)) for own in first.values()]
        strips = [Strip(f"source: {job.source}", pictures, list(first))]
    if job.between:
        title = " to ".join(job.prompts)
        names = [str(number) for number in range(1, len(edits) + 1)]
        return contact_sheet([*strips, Strip(title, [_small(edit) for edit in edits], names)])
    for number, (prompt, edit) in enumerate(zip(job.prompts, edits, strict=True)):
        pictures, names = [_small(edit)], ["edit"]
        for name, rows in made.shown.items():
            pictures.append(_grey(rows[min(number, len(rows) - 1)], pictures[0].size))
            names.append(name)
        strips.append(Strip(prompt, pictures, names))
    return contact_sheet(strips)


def _small(picture: Image) -> Image:
    """At the size of a sheet; a small one is enlarged, so that its name fits below it."""
    from trainer.media.contact_sheet import SIDE, thumbnail

    found = thumbnail(picture)
    factor = max(1, round(SIDE / 2 / max(found.size)))
    return found.resize((found.width * factor, found.height * factor))


def _grey(values: Tensor, size: tuple[int, int]) -> Image:
    """A map (h, w) of 0 to 1 as a picture of the size of others."""
    from PIL import Image

    from trainer.media.images import to_pil

    return to_pil(values.expand(3, -1, -1) * 2 - 1).resize(size, Image.Resampling.NEAREST)
