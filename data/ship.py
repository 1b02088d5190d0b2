"""What ships of a run: its adapter in half precision, under a name that recipes know.

python data/ship.py runs/animatediff/<id> tiny_motion
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import load_file

from trainer.config.header import file_of, read_header
from trainer.runs.adapter import save_adapter


def main(run: str, name: str) -> None:
    source = file_of(run)
    tree, identity = read_header(source)
    rounded = {key: value.half() for key, value in load_file(source).items()}
    target = Path(__file__).parent / name / "adapter.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_adapter(target, rounded, tree, identity)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
