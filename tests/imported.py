"""Imports what the processes of `commands.py` need, once, before they are forked."""

from __future__ import annotations

import gc
from importlib import import_module

IMPORTED = (
    "trainer.training.fit", "trainer.cli.fit", "trainer.cli.data", "trainer.cli.evaluate",
    "trainer.cli.sample", "trainer.backbones.sd", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip",
)  # fmt: skip

gc.disable()  # what is imported stays
for name in IMPORTED:
    import_module(name)
gc.freeze()  # to look at it would copy every page of it in each process
gc.enable()
