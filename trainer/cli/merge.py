"""`merge`: joins concepts that were trained separately into one adapter."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trainer.cli.options import Options, quiet_libraries, read_options
from trainer.config.run_section import DEVICES, Device
from trainer.config.schema import RecipeError


class MergeOptions(Options):
    """Joins runs of Custom Diffusion, each on its own concept, into one adapter by the paper's
    constrained least squares (arXiv 2212.04488, section 3.3)."""

    adapter: tuple[str, ...] = Field(
        description="the runs to join: run folders or adapter files",
        examples=["[runs/custom_diffusion/<a>,runs/custom_diffusion/<b>]"],
    )
    out: Path = Field(description="the adapter to write", examples=["both.safetensors"])
    captions: Path | None = Field(
        None,
        description="a text file with one ordinary caption a line, whose keys and values the merge "
        "keeps; null takes 200 that ship with the toolkit and fit the backbone: of photographs, or "
        "of the embedded world for one that knows no other words",
    )
    device: Device = Field("auto", description=f"where captions are read, in fp32: {DEVICES}")


def run(words: list[str]) -> int:
    options = read_options(words, MergeOptions)
    lines = None if options.captions is None else _captions(options.captions)
    quiet_libraries()
    from trainer.backbones.device import choose_placement
    from trainer.config.header import file_of
    from trainer.runs.merge import merge_concepts as write

    paths, out = [file_of(each) for each in options.adapter], options.out.expanduser()
    tokens = write(paths, out, lines, placement=choose_placement(options.device, "fp32"))
    print(f"{options.out}: {', '.join(tokens)}")
    return 0


def _captions(file: Path) -> list[str]:
    text = file.expanduser().read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise RecipeError(f"captions={file}: no caption in it; write one a line")
    return lines
