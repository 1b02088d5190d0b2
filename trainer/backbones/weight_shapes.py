"""Whether the weights of a part are those of its config.json, told from the headers of their files:
no value is read. Names are left out, since the libraries rename older ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.backbones.weight_files import weight_files

if TYPE_CHECKING:
    from torch import nn


def check_shapes(where: Path, model: nn.Module) -> None:
    """Checks that a part's folder has a weight for each parameter of its model. One without files
    of weights, as a configuration that ships, is passed over.

    Raises:
        ValueError: there are fewer weights of a shape than the model has parameters.
    """
    from safetensors import safe_open

    try:
        files = weight_files(where).files
    except ValueError:  # loading says what is wrong
        return
    found: Counter[tuple[int, ...]] = Counter()
    for path in files:
        with safe_open(path, "pt") as file:
            names = file.keys()
            found.update(tuple(file.get_slice(name).get_shape()) for name in names)
    for name, value in model.named_parameters():
        shape = tuple(value.shape)
        found[shape] -= 1
        if found[shape] < 0:
            raise ValueError(
                f"{where}: the weights lack one of the shape {shape}, as {name} has by its "
                "config.json; download the part again, or take the config.json it was saved with"
            )
