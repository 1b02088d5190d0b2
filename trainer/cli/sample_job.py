"""What `sample` makes: the model that its options name, and the pictures or clips to generate."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer.cli.given_adapter import (
    facts_of_given,
    given_adapter,
    load_bare,
    load_given,
    parts_of,
)
from trainer.cli.prompt_file import filled, read_prompts
from trainer.cli.repeat_picture import RepeatedPicture, compare_parts
from trainer.cli.sample_files import SampleJob, check_fit
from trainer.cli.sample_known import KnownVideo, known_of
from trainer.cli.sample_options import SAME_CLIP, SampleOptions
from trainer.cli.sample_references import reference_facts, references_of
from trainer.cli.sample_source import (
    VideoSource,
    file_facts,
    given_clip,
    image_of,
    placed_among,
    source_of,
    write_null_text,
)
from trainer.cli.sample_structure import structure_of
from trainer.common.paths import bare_name

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone
    from trainer.diffusion.edit_source import EditSource
    from trainer.diffusion.sampling_settings import Sampling
    from trainer.methods.method import Method

PLACED = ("before", "between", "after")  # where the frames of a given clip are


def job_of(
    options: SampleOptions, chosen: Mapping[str, Method], picture: RepeatedPicture | None
) -> tuple[Backbone, SampleJob]:
    """The model, placed, and what it is to make."""
    from trainer.backbones.device import choose_placement
    from trainer.diffusion.sampler import check_hooks
    from trainer.media.write_video import PLAYED

    say = partial(print, file=sys.stderr)
    given = [given_adapter(path, options.backbone, say) for path in options.adapters]
    parts = parts_of(given, options.backbone)
    if picture is not None:
        compare_parts(picture, parts)
    facts = {"backbone_parts": parts} | facts_of_given(given, options.scales) | _origin(options)
    placement = choose_placement(options.device, options.precision, lean=True)
    if given:
        own: Any = {"placement": placement, "methods": options.methods or {}}
        backbone, tree = load_given(given, options.scales, options.backbone, **own)
    else:
        backbone, tree = load_bare(str(options.backbone), chosen, placement), {}
    given_texts = [("prompt", options.prompt)] if options.prompt else read_prompts(options.prompts)
    more = [("source_prompt", options.source_prompt or ""), ("negative", options.negative)]
    *prompts, shown, negative = filled([*given_texts, *more], backbone, tree)
    settings = _settings(options, tree, negative)
    check_fit(backbone, settings)
    check_hooks(backbone, settings)
    begun = _starts(options, backbone, settings, data=tree.get("data") or {}, shown=shown)
    job = SampleJob(
        prompts=prompts,
        seeds=range(options.seed, options.seed + options.count),
        settings=settings,
        out=options.out,
        played=settings.fps or PLAYED,
        batch=options.batch,
        row=None if picture is None else picture.row,
        sheet=options.sheet,
        facts=facts | _embeddings(options, begun.get("edited")),
        **begun,
    )
    return backbone, job


def _embeddings(options: SampleOptions, edited: EditSource | None) -> dict[str, Any]:
    """Facts of the file of the embeddings that were used, which is written now where they were
    found now."""
    if edited is None or edited.uncond is None or options.source is None:
        return {}
    path = options.null_text or write_null_text(edited.uncond, options.out, options.source)
    return file_facts("null_text", path)


def _settings(options: SampleOptions, tree: Mapping[str, Any], negative: str) -> Sampling:
    """As the options say, and else the recipe of the adapter."""
    from trainer.data.source import frames_asked
    from trainer.diffusion.blocks import Blocks
    from trainer.diffusion.sampling_settings import Sampling

    previews, data, run = (tree.get(key) or {} for key in ("preview", "data", "run"))
    guidance, side = options.guidance, run.get("resolution")
    true, in_time = options.true_guidance, options.temporal_guidance
    found = Sampling(
        options.steps or int(previews.get("steps", 25)),
        float(previews.get("guidance", 5.0)) if guidance is None else guidance,
        negative,
        size=options.height_and_width or (None if side is None else (int(side), int(side))),
        frames=1 if options.image else options.frames or frames_asked(data),
        fps=options.fps or data.get("fps"),
        sampler=options.scheduler or previews.get("scheduler"),
        true_guidance=float(previews.get("true_guidance", 1.0)) if true is None else true,
        blocks=None if options.block is None else Blocks.of(options.block, options.overlap),
        reconstruction=options.reconstruction,
        corrector=options.corrector,
        condition_guidance=options.condition_guidance,
    )
    if in_time is None and found.frames > 1 and found.guided:
        in_time = float(previews.get("temporal_guidance", 1.0))
    return found if in_time is None else replace(found, temporal_guidance=in_time)


def _starts(
    options: SampleOptions,
    backbone: Backbone,
    settings: Sampling,
    *,
    data: Mapping[str, Any],
    shown: str,
) -> dict[str, Any]:
    """What sampling begins from other than noise, what it reads beside, and what it edits, as
    fields of the job. shown: the source prompt."""
    from trainer.diffusion.channel_values import channels_for
    from trainer.diffusion.edit_source import EditSource

    edited = None if options.source_prompt is None else EditSource(shown)
    inputs = _inputs(options, backbone, settings, data=data)
    if options.image is not None:
        size = settings.size or (backbone.resolution, backbone.resolution)
        begun = image_of(options.image, size, options.strength)
        return {"image": begun, "inputs": inputs, "edited": edited}
    if options.known is not None:
        video = KnownVideo(
            options.known, take=options.take, every=options.every, shrink=options.shrink
        )
        return {"inputs": inputs, "known": known_of(backbone, video, settings), "edited": edited}
    placed = {key: getattr(options, key) for key in PLACED}
    where = placed_among(backbone.given_frames, placed, options.source)
    if options.source is None:
        return {"inputs": inputs, "edited": edited}
    if where is not None:
        _check_completes(options)
        return {"given": given_clip(backbone, options.source, settings, where=where)}
    if options.count > 1 or options.prompts is not None:
        raise ValueError(SAME_CLIP)
    model = (options.adapter, options.scale, options.backbone, options.methods)
    source = VideoSource(options.source, model, edited=edited, null_text=options.null_text)
    channels = channels_for(backbone, [options.seed], settings, inputs=inputs)
    made = source_of(backbone, source, settings, data=data, channels=channels)
    return {"inputs": inputs, "start": made.start, "edited": made.edited}


def _inputs(
    options: SampleOptions, backbone: Backbone, settings: Sampling, *, data: Mapping[str, Any]
) -> dict[str, Any]:
    """What the model reads beside texts."""
    level, clip = options.structure_level, options.structure
    structure = structure_of(backbone, clip, level, settings=settings, data=data)
    return structure | references_of(backbone, options, settings)


def _check_completes(options: SampleOptions) -> None:
    """Raises ValueError for what a model that completes a given clip does not read."""
    for key in ("source_prompt", "structure"):
        if getattr(options, key) is not None:
            raise ValueError(
                f"{key}= is not read by a model that completes the clip of source=; leave it out"
            )


def _origin(options: SampleOptions) -> dict[str, Any]:
    """What else a picture is made of, as facts for its file."""
    found: dict[str, Any] = {}
    for key in ("source", "image", "structure", "known"):
        found |= file_facts(key, getattr(options, key))
    found |= reference_facts(options)
    if options.structure is not None:
        found["structure_level"] = options.structure_level
    if options.known is not None:
        found |= {name: getattr(options, name) for name in ("take", "every", "shrink")}
    if options.known is not None or options.block is not None:
        found |= {name: getattr(options, name) for name in ("reconstruction", "corrector")}
    found |= {key: value for key in PLACED if (value := getattr(options, key)) is not None}
    if options.image is not None:
        found["strength"] = options.strength
    if options.adapters and options.backbone is not None:
        found["over"] = bare_name(options.backbone)
    if options.methods:
        found["methods"] = options.methods
    if options.source_prompt is not None:
        found["source_prompt"] = options.source_prompt
    return found
