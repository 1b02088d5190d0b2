"""The least that a step can take: a plain PyTorch loop around the layers of a recipe, for
bench/peers.py. Latents, texts, noise and timesteps are there before it begins; forward, loss,
backward, clipping, AdamW, and nothing else.

    python bench/_tight_loop.py recipe=lora_folder data.folder=./pictures
"""

from __future__ import annotations

import sys

import torch
from torch.nn.functional import mse_loss

from trainer.backbones import load_backbone
from trainer.config.load import load_recipe
from trainer.data.loader import Planned
from trainer.diffusion.objective import target_of
from trainer.methods.apply import apply_methods
from trainer.training.build import latents, module_of, needs, step_plan

BATCHES = 8  # different ones, in turn


def main(words: list[str]) -> None:
    recipe = load_recipe(words)
    torch.manual_seed(recipe.run.seed)
    backbone = load_backbone(recipe.backbone, recipe.backbone_name)
    backbone.eval().requires_grad_(False)
    data, _ = recipe.data.open(needs(recipe, backbone))
    plan = apply_methods(backbone, recipe.methods, recipe.run.seed)
    module = module_of(recipe, backbone, plan)
    batches = Planned(data, step_plan(recipe, data), latents(recipe, backbone, data), 0, 1)
    ready = []
    for number in range(BATCHES):
        with torch.no_grad():
            state = module.task.encode(batches[number])
            target = target_of(module.task.objective, state.x0, state.noise, t=state.t)
            ready.append((backbone.inputs(state.x_t, state.t, state.condition), target))
    denoiser = backbone.denoiser.train()
    trained = list(module.trainable().values())
    optimizer = torch.optim.AdamW(trained, lr=recipe.optim.lr, weight_decay=1e-2)
    for step in range(recipe.run.steps):
        inputs, target = ready[step % BATCHES]
        loss = mse_loss(denoiser(**inputs).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(sys.argv[1:])
