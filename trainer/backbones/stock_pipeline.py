"""A backbone as diffusers' own pipeline. Importing this imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.backbones.family import tokenizer_name

if TYPE_CHECKING:
    from trainer.backbones.backbone import Backbone


def stock_pipeline(backbone: Backbone, kind: str, **options: Any) -> Any:
    """The parts of a backbone, shared and not copied, as the pipeline of this class. Text encoders
    that the backbone lacks are None; options: further arguments of the class."""
    import diffusers

    from trainer.backbones.vae import with_widths

    # one that knows a single class of VAE asks for nothing that the others have
    vae = backbone.vae if len(backbone.declared.latents.vaes) == 1 else with_widths(backbone.vae)
    text: dict[str, Any] = {}
    for part in backbone.declared.text_encoders:
        text[part] = backbone.text_encoders.get(part)
        text[tokenizer_name(part)] = backbone.tokenizers.get(part)
    return getattr(diffusers, kind)(
        **{backbone.denoiser_name: backbone.denoiser},
        vae=vae,
        scheduler=backbone.scheduler(),
        **text,
        **options,
    )
