"""U-Nets, and the blocks and small transformers that go with them."""

from __future__ import annotations

from typing import Any

from attention.denoiser_case import case, give, mask, times

# fmt: off
CROSS: dict[str, Any] = {
    "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4,
    "cross_attention_dim": 12,
}
BLOCKS_2D: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
BLOCKS_3D: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
}

CASES = [
    case(
        "UNet1DModel", lambda r: give(sample=r(2, 2, 64), timestep=times(7, 3)),
        sample_size=64, extra_in_channels=64, block_out_channels=(32, 32, 64),
    ),
    case(
        "UNet2DModel", lambda r: give(sample=r(2, 3, 8, 12), timestep=times(7, 3)),
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
    ),
    case(
        "UNet2DConditionModel",
        lambda r: give(
            sample=r(2, 4, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
            encoder_attention_mask=mask(5),
            added_cond_kwargs={"text_embeds": r(2, 10), "time_ids": r.below(9, 2, 6)},
        ),
        sample_size=8, attention_head_dim=(2, 4), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=58, use_linear_projection=True, **CROSS, **BLOCKS_2D,
    ),
    case(
        "UNet3DConditionModel",
        lambda r: give(
            sample=r(2, 4, 3, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
        ),
        sample_size=8, attention_head_dim=8, **CROSS, **BLOCKS_3D,
    ),
    case(
        "I2VGenXLUNet",
        lambda r: give(
            sample=r(2, 4, 3, 8, 12), timestep=times(7, 3), fps=times(8, 16),
            image_latents=r(2, 4, 3, 8, 12), image_embeddings=r(2, 12),
            encoder_hidden_states=r(2, 5, 12),
        ),
        sample_size=8, attention_head_dim=8, **CROSS, **BLOCKS_3D,
    ),
    case(
        "UNetMotionModel",
        lambda r: give(
            sample=r(2, 4, 3, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(6, 5, 12),
        ),
        sample_size=8, num_attention_heads=2, motion_num_attention_heads=4,
        down_block_types=("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"), **CROSS,
    ),
    case(
        "UNetSpatioTemporalConditionModel",
        lambda r: give(
            sample=r(2, 3, 8, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
            added_time_ids=r.below(9, 2, 3),
        ),
        sample_size=8, num_attention_heads=(2, 4), num_frames=3, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"),
        up_block_types=("CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ),
    case(
        "AudioLDM2UNet2DConditionModel",
        lambda r: give(
            sample=r(2, 4, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
            encoder_attention_mask=mask(5), encoder_hidden_states_1=r(2, 7, 10),
            encoder_attention_mask_1=mask(7),
        ),
        sample_size=8, attention_head_dim=2,
        **(CROSS | {"cross_attention_dim": ((None, 12, 10), (None, 12, 10))}), **BLOCKS_2D,
    ),
    case(
        "Kandinsky3UNet",
        lambda r: give(
            sample=r(2, 4, 16, 24), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 10),
            encoder_attention_mask=mask(5),
        ),
        time_embedding_dim=32, groups=4, attention_head_dim=8, layers_per_block=2,
        block_out_channels=(8, 16, 32, 64), cross_attention_dim=12, encoder_hid_dim=10,
    ),
    case(
        "StableCascadeUNet",
        lambda r: give(
            sample=r(2, 4, 8, 12), timestep_ratio=times(), clip_text_pooled=r(2, 1, 10),
            clip_text=r(2, 7, 14), clip_img=r(2, 1, 18),
        ),
        in_channels=4, out_channels=4, conditioning_dim=12, timestep_ratio_embedding_dim=8,
        block_out_channels=(16, 32), num_attention_heads=(2, 4), down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1), clip_text_in_channels=14, clip_text_pooled_in_channels=10,
        clip_image_in_channels=18, clip_seq=2,
    ),
    case(
        "DreamLiteUNetModel",
        lambda r: give(
            sample=r(2, 4, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
            encoder_attention_mask=mask(5),
        ),
        sample_size=8, attention_head_dim=8, **(CROSS | {"block_out_channels": (16, 32, 32)}),
    ),
    case(
        "UNetControlNetXSModel",
        lambda r: give(
            sample=r(2, 4, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
            controlnet_cond=r(2, 3, 16, 24),
        ),
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=12,
        num_attention_heads=2, ctrl_conditioning_embedding_out_channels=(4, 8),
        ctrl_block_out_channels=(8, 16), ctrl_num_attention_heads=2, ctrl_max_norm_num_groups=4,
        **BLOCKS_2D,
    ),
    case(
        "UVit2DModel",
        lambda r: give(
            input_ids=r.below(30, 2, 4, 6), encoder_hidden_states=r(2, 5, 12),
            pooled_text_emb=r(2, 10), micro_conds=r.below(9, 2, 5),
        ),
        hidden_size=16, cond_embed_dim=10, micro_cond_encode_dim=4, micro_cond_embed_dim=20,
        encoder_hidden_size=12, vocab_size=32, codebook_size=30, in_channels=16,
        block_out_channels=16, num_res_blocks=1, block_num_heads=2, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=32, sample_size=4,
    ),
    case(
        "UniDiffuserModel",
        lambda r: give(
            latent_image_embeds=r(2, 4, 8, 8), image_embeds=r(2, 1, 10), prompt_embeds=r(2, 7, 12),
            timestep_img=times(7, 3), timestep_text=times(2, 5),
        ),
        text_dim=12, clip_img_dim=10, num_text_tokens=7, num_attention_heads=2,
        attention_head_dim=8, in_channels=4, out_channels=4, num_layers=3, sample_size=8,
        patch_size=2, norm_num_groups=4, attention_bias=True, activation_fn="gelu",
        use_data_type_embedding=True,
    ),
    case(
        "Transformer2DModel",
        lambda r: give(
            hidden_states=r(2, 8, 4, 6), encoder_hidden_states=r(2, 5, 12),
            encoder_attention_mask=mask(5),
        ),
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2,
        norm_num_groups=4, cross_attention_dim=12,
    ),
    case(
        "DreamLiteTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 8, 4, 6), encoder_hidden_states=r(2, 5, 12),
            encoder_attention_mask=mask(5),
        ),
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2,
        norm_num_groups=4, cross_attention_dim=12, qk_norm="rms_norm",
    ),
    case(
        "TransformerTemporalModel",
        lambda r: give(hidden_states=r(6, 8, 4, 5), num_frames=3),
        num_attention_heads=2, attention_head_dim=8, in_channels=8, num_layers=2,
        norm_num_groups=4,
    ),
    case(
        "PriorTransformer",
        lambda r: give(
            hidden_states=r(2, 12), timestep=times(7, 3), proj_embedding=r(2, 12),
            encoder_hidden_states=r(2, 5, 12), attention_mask=mask(5).bool(),
        ),
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12,
        num_embeddings=5,
    ),
]
