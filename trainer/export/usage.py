"""How the files of an export are used: the text and the python call of its README. The proof runs
that very call, see `printed_call.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.backbones.family import tokenizer_name
from trainer.backbones.word_vectors import with_all_vectors
from trainer.common.version import own_version
from trainer.export import tokens
from trainer.export.card import Card
from trainer.export.job import Job
from trainer.export.prompt_lines import (
    call_options,
    guides_beside_negative,
    prompt_code,
    prompt_text,
)
from trainer.export.read_tokens import CLIPS, EMBEDDINGS, WORD
from trainer.export.tensor_files import load_tensors

README = "README.md"
STEPS = 25  # of the sampler, in the call
# of a clip in the call where the adapter was not trained on clips: of latents, else of pixels
LATENT_FRAMES, FRAMES = 5, 16


@dataclass(frozen=True)
class Usage:
    """How written files are used.

    text: paragraphs for people. warning: what the user should know, said by the export too. call:
    lines of python that load the files into `pipe`, a stock pipeline; None where no python library
    reads them. imports: what the lines need; arguments: of `from_pretrained` of the pipeline;
    before: lines that must come before it. pipeline: its class. given: further arguments
    of its call. complete: whether the folder itself
    is the pipeline; partial: whether the call reads a part of the files.
    """

    text: tuple[str, ...] = ()
    warning: str | None = None
    call: tuple[str, ...] | None = None
    imports: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    pipeline: str = ""
    given: tuple[str, ...] = ()
    complete: bool = False
    partial: bool = False


def stock_usage(job: Job, **more: Any) -> Usage:
    """A usage with the stock pipeline of the job's backbone."""
    return Usage(pipeline=type(job.base.pipeline()).__name__, **more)


def write_readme(job: Job, usage: Usage, *, format_name: str, folder: Path) -> None:
    text = "\n".join(_readme(job.card, usage, job.base, format_name=format_name))
    (folder / README).write_text(text + "\n", encoding="utf-8")


def _readme(card: Card, usage: Usage, base: Any, *, format_name: str) -> Iterator[str]:
    yield f"# {card.title}\n"
    where = f" (`{card.hub}` at `{card.revision}`)" if card.hub else ""
    made = f" with {', '.join(card.methods)}" if card.methods else ""
    yield f"An adapter for the backbone {card.backbone}{where}, trained{made} by attention-trainer"
    yield f"{own_version()}, in the format `{format_name}`.\n"
    if card.trained:
        yield f"Words that call it: {', '.join(f'`{word}`' for word in card.trained)}.\n"
    if card.size:
        asked = asked_size(card.size, base)
        other = "" if asked == card.size else "; the call below asks for the nearest that it takes"
        yield f"Trained at {card.size[0]}x{card.size[1]} pixels{other}.\n"
    if prompts := prompt_text(base, called=usage.call is not None):
        yield f"{prompts}\n"
    warning = (f"{usage.warning[0].upper()}{usage.warning[1:]}.",) if usage.warning else ()
    for paragraph in (*warning, *usage.text):
        yield f"{paragraph}\n"
    if usage.call is not None:
        yield "In Python, with diffusers" + (":" if usage.complete else ", on the backbone:")
        yield "\n```python"
        yield from _python(card, usage, base)
        yield "```"


def _python(card: Card, usage: Usage, base: Any) -> Iterator[str]:
    clip = usage.pipeline == "AnimateDiffPipeline" or base.layout == "tokens"
    yield from ("import torch", *sorted(_imports(usage, base, clip)), "")
    yield 'folder = "."  # where this file is'
    if not usage.complete:
        origin = card.hub or f"path/to/{card.backbone}"
        yield f"base = {origin!r}  # the backbone"
    yield 'device = "cuda" if torch.cuda.is_available() else "cpu"'
    yield f"steps = {STEPS}"
    if clip:
        usual = frames_of_call(base, LATENT_FRAMES, FRAMES)
        yield f"frames = {card.frames if card.frames > 1 else usual}"
    yield "dtype = torch.float32  # or torch.float16 on a GPU, which is faster"
    yield ""
    yield from usage.before
    arguments = ["dtype=dtype", *usage.arguments, *_lacking(base)]
    if not usage.complete:
        arguments += [f"revision={card.revision!r}"] if card.revision else []
    if usage.pipeline == "StableDiffusionPipeline":
        arguments.append("safety_checker=None")
    source = "folder" if usage.complete else "base"
    yield f"pipe = {usage.pipeline}.from_pretrained({source}, {', '.join(arguments)})"
    if not usage.complete:
        yield from _scheduler(base)
    yield from usage.call or ()
    yield "pipe.to(device)"
    lines, given = prompt_code(_prompt(card, base), base)
    yield from lines
    wide, high = asked_size(card.size, base) if card.size else (None, None)
    sized = card.size and "width" in call_options(base)
    size = f", width={wide}, height={high}" if sized else ""
    own = ", ".join((f"num_inference_steps=steps{size}{_options(base)}", *usage.given))
    if clip:
        kind = ', output_type="pil"' if base.layout == "tokens" else ""
        yield f"clip = pipe({given}, num_frames=frames, {own}{kind}).frames[0]"
        yield 'export_to_gif(clip, "clip.gif")'
    else:
        yield f"picture = pipe({given}, {own}).images[0]"
        yield 'picture.save("picture.png")'


def _prompt(card: Card, base: Any) -> str:
    """With all vectors of a word, where the stock pipeline does not put them in by itself."""
    if hasattr(base.pipeline(), "maybe_convert_prompt"):
        return card.prompt
    return with_all_vectors(card.prompt, card.trained)


def asked_size(size: tuple[int, int], base: Any) -> tuple[int, int]:
    """Width and height for a stock pipeline, which may not take all sides that are trained at."""
    step = base.declared.stock_multiple
    width, height = (max(step, round(side / step) * step) for side in size)
    return width, height


def frames_of_call(base: Any, latent_frames: int, frames: int) -> int:
    """Frames of a clip of so many latent frames where the VAE compresses time, else `frames`."""
    known = base.clip_frames
    return int(known.shown(latent_frames)) if known.in_time else frames


def _options(base: Any) -> str:
    """Options of some pipelines: to make the size that is asked for, to read as many tokens as the
    text encoder has positions, and to put no instruction before the prompt, as in training."""
    wanted = {
        "use_resolution_binning": False,
        "max_sequence_length": base.sequence_length,
        "complex_human_instruction": None,
    }
    known = call_options(base)
    given = "".join(f", {key}={value}" for key, value in wanted.items() if key in known)
    return given + (", negative_prompt=''" if guides_beside_negative(base) else "")


def _lacking(base: Any) -> list[str]:
    """What a stock pipeline must be told of text encoders that the folder does not have."""
    absent = [part for part in base.declared.text_encoders if part not in base.text_encoders]
    return [f"{name}=None" for part in absent for name in (part, tokenizer_name(part))]


def _imports(usage: Usage, base: Any, clip: bool) -> set[str]:
    names = {usage.pipeline}
    if not usage.complete and (solver := _other_solver(base)) is not None:
        names.add(type(solver).__name__)
    found = {f"from diffusers import {', '.join(sorted(names))}", *usage.imports}
    return found | ({"from diffusers.utils import export_to_gif"} if clip else set())


def _other_solver(base: Any) -> Any:
    """The scheduler that a stock pipeline needs in place of the backbone's; None if it is fine."""
    solver = base.pipeline().scheduler
    return None if isinstance(solver, base.scheduler_class) else solver


def _scheduler(base: Any) -> Iterator[str]:
    solver = _other_solver(base)
    if solver is not None:
        wanted = ("num_train_timesteps", "prediction_type", "use_flow_sigmas", "flow_shift")
        given = ", ".join(f"{key}={solver.config[key]!r}" for key in wanted)
        yield f"pipe.scheduler = {type(solver).__name__}({given})"


def word_lines(folder: Path, pipeline: Any) -> tuple[list[str], list[str]]:
    """Lines of python that load a folder's words into `pipe`, and the imports they need."""
    names = [path.name for path in tokens.files(folder)]
    if hasattr(pipeline, "text_encoder_2") and hasattr(pipeline, "load_textual_inversion"):
        return _lines_of_two(folder), ["from safetensors.torch import load_file"] if names else []
    if hasattr(pipeline, "load_textual_inversion"):
        load = 'pipe.load_textual_inversion(f"{folder}/embeddings", weight_name='
        return [f"{load}{name!r})" for name in names], []
    if not names:
        return [], []
    lines = f"""
for name in {names!r}:
    ((word, rows),) = load_file(f"{{folder}}/embeddings/{{name}}").items()
    rows = rows.reshape(-1, rows.shape[-1])  # of a word of several vectors each its own token
    pipe.tokenizer.add_tokens([word, *(f"{{word}}_{{n}}" for n in range(1, len(rows)))])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    pipe.text_encoder.get_input_embeddings().weight.data[-len(rows):] = rows"""
    return lines.strip().splitlines(), ["from safetensors.torch import load_file"]


def _lines_of_two(folder: Path) -> list[str]:
    """For a pipeline of two CLIPs. The second pools at the largest id where its file says that the
    end of text is token 2, as that of SDXL does; the words' ids are larger than that of the end."""
    lines = []
    for path in tokens.files(folder):
        rows, header = load_tensors(path)
        lines.append(f'rows = load_file(f"{{folder}}/embeddings/{path.name}")')
        for key, number in zip(CLIPS, ("", "_2"), strict=True):
            parts = f"text_encoder=pipe.text_encoder{number}, tokenizer=pipe.tokenizer{number}"
            word = f"rows[{key!r}], token={header[WORD]!r}"
            lines += [f"pipe.load_textual_inversion({word}, {parts})"] if key in rows else []
    end = "pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id"
    return [*lines, end] if lines else []


def word_text(card: Card, folder: Path) -> tuple[str, ...]:
    """How UIs find the words of a folder."""
    if not (files := tokens.files(folder)):
        return ()
    stems = [path.stem for path in files]
    return (
        f"Copy the files of `{EMBEDDINGS}/` to the UI's embeddings. There a word is called "
        f"by the name of its file: {', '.join(f'`{stem}`' for stem in stems)} in UIs of the A1111 "
        f"family, `embedding:{stems[0]}` in ComfyUI.",
    )
