"""`export`: writes an adapter in a format of another tool, and proves that it loads the same."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import Field, model_validator

from trainer.cli.options import Count, Options, quiet_libraries, read_options
from trainer.config.run_section import DEVICES, Device


class ExportOptions(Options):
    """Writes an adapter into a new folder or file in the format of another tool, loads it with that
    tool's own code, and compares the output with that of the adapter. run or adapter is needed."""

    run: Path | None = Field(
        None,
        description="the run folder whose adapter is written",
        examples=["runs/custom_diffusion/<id>"],
    )
    adapter: Path | None = Field(
        None, description="the adapter to write, in place of run: a file or a run folder"
    )
    out: Path | None = Field(
        None,
        description="the folder to write, in which files are called as the run; or, with "
        "format=comfyui, custom_diffusion, diff, diffusers or kohya, the very file, as in "
        "my_dog.safetensors, or a folder that is there, for a file called as the run. Nothing is "
        "overwritten; null makes the folder <run>-<format> here",
        examples=["./my_dog"],
    )
    format: str = Field(
        "merged",
        description="merged (a diffusers folder), diffusers, custom_diffusion, kohya, comfyui, "
        "diff, peft or animatediff",
    )
    dtype: str = Field("float32", description="what the file holds: float32, float16 or bfloat16")
    rank: Count | None = Field(
        None,
        description="cut the change of every layer to this many singular directions, for the "
        "formats of low rank; what it loses is printed. null keeps the change exact",
    )

    device: Device = Field("auto", description=f"where the files are proven, in fp32: {DEVICES}")

    @model_validator(mode="after")
    def _has_a_source(self) -> ExportOptions:
        if self.run is None and self.adapter is None:
            raise ValueError("give run=<run folder>, or adapter=<file>")
        if self.run is not None and self.adapter is not None:
            raise ValueError("give run or adapter, not both")
        return self


def run(words: list[str]) -> int:
    options = read_options(words, ExportOptions)
    source = options.adapter or options.run
    assert source is not None
    quiet_libraries()
    from trainer.backbones.device import choose_placement
    from trainer.config.header import file_of, read_header
    from trainer.export.export import export as write
    from trainer.export.out_path import settle_out
    from trainer.runs.run_folder import later_checkpoint

    path = file_of(source.expanduser())
    recipe = str(read_header(path)[0].get("recipe", ""))
    if (later := later_checkpoint(path)) is not None:
        print(later, file=sys.stderr)
    given = None if options.out is None else options.out.expanduser()
    out, title = settle_out(given, path, recipe, format_name=options.format)
    print(
        write(
            path,
            out,
            options.format,
            dtype=options.dtype,
            rank=options.rank,
            title=title,
            placement=choose_placement(options.device, "fp32"),
        )
    )
    return 0
