"""`import`: makes an adapter from a file of another tool."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from trainer.cli.options import Options, quiet_libraries, read_options
from trainer.config.run_section import DEVICES, Device


class ImportOptions(Options):
    """Reads a LoRA, DoRA, Custom Diffusion or embedding file that another tool has written, and
    writes an adapter that `run.start_from`, `sample` and `export` take."""

    file: Path = Field(
        description="a safetensors file, or a folder with one", examples=["./lora.safetensors"]
    )
    backbone: str = Field(
        description="the backbone it was made for: a name or a folder", examples=["sd15"]
    )
    out: Path = Field(
        description="the adapter to write; it must not exist yet",
        examples=["./lora_adapter.safetensors"],
    )
    format: str = Field(
        "auto", description="the format of the file; auto recognises it by the names of its tensors"
    )
    device: Device = Field("auto", description=f"where the adapter is proven, in fp32: {DEVICES}")


def run(words: list[str]) -> int:
    options = read_options(words, ImportOptions)
    quiet_libraries()
    from trainer.backbones.device import choose_placement
    from trainer.export.import_ import import_file

    source, out = options.file.expanduser(), options.out.expanduser()
    placement = choose_placement(options.device, "fp32")
    print(
        import_file(source, options.backbone, out, format_name=options.format, placement=placement)
    )
    return 0
