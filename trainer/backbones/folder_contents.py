"""What a pipeline folder says of itself, read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.backbones.latent_form import COLOURS


@dataclass(frozen=True)
class FolderContents:
    """What a folder says of itself.

    name: of the backbone; index: model_index.json; configs: of the denoiser, if it is not made from
    nothing, the text encoders and the VAE, where the family has one; scheduler: its configuration,
    and where that is.
    """

    name: str
    index: Mapping[str, Any]
    configs: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    where: Path

    def refuse(self, part: str, what: str) -> ValueError:
        """The error about a part."""
        return ValueError(f"backbone {self.name}: {part} {what}")

    @property
    def vae(self) -> str:
        """The class of the VAE: what its own config says, else the index."""
        own = self.configs["vae"].get("_class_name")
        return str(own or (self.index.get("vae") or (None, None))[1])

    @property
    def latent_channels(self) -> int:
        config = self.configs.get("vae", {"latent_channels": COLOURS})
        return int(config.get("latent_channels") or config.get("z_dim") or 4)

    def width_of(self, part: str) -> int | None:
        """The width of a text encoder's features; None where its config does not say."""
        config = self.configs[part]
        inner = config.get("text_config") or {}  # of a model that also sees pictures
        width = config.get("hidden_size") or config.get("d_model") or inner.get("hidden_size")
        return None if width is None else int(width)
