"""Files that are no adapters are told by what they are; adapters are not taken for them."""

from __future__ import annotations

import pytest

from trainer.export.other_files import what_it_is

KNOWN = {
    "first_stage_model.decoder.conv_in.weight": "a complete checkpoint; give one of",
    "model.diffusion_model.input_blocks.0.0.weight": "a checkpoint's denoiser; give one of",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "lllite_unet_input_blocks_1_1.down.0.weight": "a ControlNet",
    "ip_adapter.1.to_k_ip.weight": "an IP-Adapter",
    "image_proj.proj.weight": "an IP-Adapter",
    "adapter.body.0.block1.weight": "a T2I-Adapter",
    "320.0.linear.0.weight": "a hypernetwork",
    "decoder.conv_in.weight": "a VAE; give the folder",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "a VAE; give the folder",
    "down_blocks.0.attentions.0.norm.weight": "a denoiser's weights; give the folder",
    "transformer_blocks.0.attn1.to_q.weight": "a denoiser's weights",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder's weights",
    "base_model.model.unet.conv_in.vera_lambda_d": "a VeRA adapter",
    "text_encoder.embeddings.token_embedding.trainable_tokens_delta": "trained rows",
}
# adapters of layers, in their spellings
ADAPTERS = """
model.diffusion_model.input_blocks.1.1.proj_in.diff
down_blocks.0.attentions.0.proj_in.lora_A.weight
transformer_blocks.0.attn1.to_q.lora.up.weight
unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight
lora_unet_mid_block_attentions_0_proj_in.hada_w1_a
lycoris_mid_block_attentions_0_proj_in.lokr_w1
down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight
transformer_blocks.0.attn1.to_q.oft_blocks
bundle_emb.zwx.emb_params
"""


@pytest.mark.parametrize("key", KNOWN)
def test_it_is_told_what_it_is(key: str) -> None:
    said = what_it_is([key])
    assert said is not None and said.startswith(KNOWN[key])
    assert what_it_is(["another.name", key]) == said


@pytest.mark.parametrize("key", ADAPTERS.split())
def test_adapters_are_not_taken_for_others(key: str) -> None:
    assert what_it_is([key]) is None
    assert what_it_is([key, "down_blocks.0.attentions.0.norm.weight"]) is None


def test_of_unknown_names_nothing_is_said() -> None:
    assert what_it_is([]) is None and what_it_is(["x.y.z"]) is None
