"""Transformers for images. The grid of tokens is 3 x 5 or 4 x 6, the text has 7 tokens or 5."""

from __future__ import annotations

from typing import Any

import torch
from attention.denoiser_case import Draw, case, give, grid, mask, times
from torch import Tensor

# fmt: off
BLOCKS: dict[str, Any] = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
}
FLUX: dict[str, Any] = {**BLOCKS, "patch_size": 1, "in_channels": 4, "joint_attention_dim": 12}
DIT: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2,
    "sample_size": 8, "patch_size": 2,
}
HUNYUAN: dict[str, Any] = {**BLOCKS, "num_refiner_layers": 2, "text_embed_dim": 12}
COGVIEW: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "text_embed_dim": 12, "time_embed_dim": 16, "condition_dim": 4,
}


def packed(r: Draw, **more: Any) -> dict[str, Any]:
    """Images as rows of 15 tokens, each token with its place."""
    return give(
        hidden_states=r(2, 15, 4), encoder_hidden_states=r(2, 7, 12), timestep=times(),
        img_ids=grid(1, 3, 5), txt_ids=torch.zeros(7, 3), **more,
    )


def turns(r: Draw, *shape: int) -> Tensor:
    """Complex numbers of size 1: rotary positions."""
    angles = r(*shape)
    return torch.polar(torch.ones_like(angles), angles)


def seen(text: int, image: int) -> Tensor:
    """(2, text + image): which of all tokens others see."""
    return torch.cat([mask(text), torch.ones(2, image)], 1).bool()


def ideogram(r: Draw) -> dict[str, Any]:
    indicator = torch.tensor([[-1] * 2 + [3] * 5 + [2] * 15, [3] * 7 + [2] * 15])
    places = torch.cat([torch.arange(7)[:, None].expand(7, 3), 100 + grid(1, 3, 5).long()])
    return give(
        hidden_states=r(2, 22, 4), encoder_hidden_states=r(2, 22, 12), timestep=times(),
        position_ids=places.expand(2, 22, 3), segment_ids=(indicator > 0).long(),
        indicator=indicator,
    )


def omnigen(r: Draw) -> dict[str, Any]:
    """9 words, 6 of which stand for an input image, the time, and 12 tokens of the output."""
    sees = torch.ones(2, 22, 22)
    sees[0, :, :2] = 0
    sees[:, :9, :9] = sees[:, :9, :9].tril()
    return give(
        hidden_states=r(2, 4, 6, 8), timestep=times(), input_ids=r.below(20, 2, 9),
        input_img_latents=[r(1, 4, 4, 6)], input_image_sizes={0: [[3, 9]]}, attention_mask=sees,
        position_ids=torch.arange(22).expand(2, 22),
    )


def qwen_21(r: Draw) -> dict[str, Any]:
    """5 slots of text, 2 of which stand for 4 tokens each of an input image, 6 for the output."""
    slots = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]]).bool().expand(2, 11)
    return give(
        hidden_states=r(2, 32, 4), encoder_hidden_states=r(2, 5, 12), timestep=times(),
        img_shapes=[[(1, 2, 4), (1, 4, 6)]] * 2, img_mask=slots,
        encoder_hidden_states_mask=mask(5, off=1),
    )


CASES = [
    case("DiTTransformer2DModel",  # it takes squares only
        lambda r: give(
            hidden_states=r(2, 4, 8, 8), timestep=times(7, 3), class_labels=torch.tensor([1, 2]),
        ), num_embeds_ada_norm=10, out_channels=8, norm_num_groups=4, **DIT),
    case("PixArtTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
            encoder_attention_mask=mask(7),
            added_cond_kwargs={"resolution": r(2, 2), "aspect_ratio": r(2, 1)},
        ), cross_attention_dim=24, caption_channels=12, use_additional_conditions=True,
        norm_num_groups=4, **(DIT | {"num_attention_heads": 3})),
    case("SanaTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
            encoder_attention_mask=mask(7), guidance=times(1, 2),
        ), out_channels=4, num_cross_attention_heads=4, cross_attention_head_dim=4,
        cross_attention_dim=16, caption_channels=12, guidance_embeds=True,
        qk_norm="rms_norm_across_heads", **DIT),
    case("SD3Transformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
            pooled_projections=r(2, 10),
        ), out_channels=4, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=10, pos_embed_max_size=8, dual_attention_layers=(0, 1),
        qk_norm="rms_norm", **(DIT | {"num_layers": 3})),
    case("AuraFlowTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(),
        ), sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pos_embed_max_size=64),
    case("HunyuanDiT2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), timestep=times(7, 3), encoder_hidden_states=r(2, 5, 12),
            text_embedding_mask=mask(5), encoder_hidden_states_t5=r(2, 7, 16),
            text_embedding_mask_t5=mask(7), image_meta_size=r(2, 6), style=torch.zeros(2).long(),
            image_rotary_emb=(r(24, 8).cos(), r(24, 8).sin()),
        ), hidden_size=16, cross_attention_dim=12, cross_attention_dim_t5=16,
        pooled_projection_dim=10, text_len=5, text_len_t5=7, **(DIT | {"num_layers": 4})),
    case("CogView3PlusTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
            original_size=r(2, 2), target_size=r(2, 2), crop_coords=r(2, 2),
        ), pos_embed_max_size=8, sample_size=8, **COGVIEW),
    case("CogView4Transformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
            original_size=r(2, 2), target_size=r(2, 2), crop_coords=r(2, 2),
            attention_mask=mask(7),
        ), sample_size=8, rope_axes_dim=(8, 8), **COGVIEW),
    case("GlmImageTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
            prior_token_id=r.below(20, 2, 24), prior_token_drop=torch.tensor([False, True]),
            target_size=r(2, 2), crop_coords=r(2, 2), attention_mask=mask(7),
        ), prior_vq_quantizer_codebook_size=20, **COGVIEW),
    case("FluxTransformer2DModel",
        lambda r: packed(r, pooled_projections=r(2, 10), guidance=times(1, 2)),
        pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 4, 8), **FLUX),
    case("ChromaTransformer2DModel",
        lambda r: packed(r, attention_mask=seen(7, 15)),
        axes_dims_rope=(4, 4, 8), approximator_num_channels=16, approximator_hidden_dim=16,
        approximator_layers=2, **FLUX),
    case("BriaTransformer2DModel", lambda r: packed(r), axes_dims_rope=[4, 4, 8], **FLUX),
    case("BriaFiboTransformer2DModel",
        lambda r: packed(
            r, text_encoder_layers=[r(2, 7, 10) for _ in range(4)],
            joint_attention_kwargs={"attention_mask": seen(7, 15)[:, None, None]},
        ),
        axes_dims_rope=[4, 4, 8], text_encoder_dim=10, **FLUX),
    case("LongCatImageTransformer2DModel", lambda r: packed(r), axes_dims_rope=[4, 4, 8],
        pooled_projection_dim=12, **FLUX),
    case("OvisImageTransformer2DModel", lambda r: packed(r), axes_dims_rope=(4, 4, 8),
        out_channels=4, **FLUX),
    case("Flux2Transformer2DModel",
        lambda r: packed(r, guidance=times(1, 2)) | give(
            img_ids=grid(1, 3, 5, 1), txt_ids=grid(1, 1, 1, 7),
        ), timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **FLUX),
    case("Flux3Transformer2DModel",
        lambda r: packed(r, image_cond_hidden_states=r(2, 6, 4), target_timestep=times()) | give(
            img_ids=grid(1, 3, 5, 1), txt_ids=grid(1, 1, 1, 7), image_cond_ids=grid(1, 2, 3, 1),
        ), in_channels=4, cond_in_channels=4, joint_attention_dim=12, timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4), flow_map=True, **BLOCKS),
    case("HunyuanImageTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 3, 5), timestep=times(7, 3), timestep_r=times(5, 1),
            encoder_hidden_states=r(2, 7, 12), encoder_attention_mask=mask(7),
            encoder_hidden_states_2=r(2, 5, 10), encoder_attention_mask_2=mask(5),
            guidance=times(1, 2),
        ), in_channels=4, out_channels=4, text_embed_2_dim=10, rope_axes_dim=(8, 8),
        guidance_embeds=True, use_meanflow=True, **HUNYUAN),
    case("QwenImageTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 15, 4), encoder_hidden_states=r(2, 7, 12), timestep=times(),
            encoder_hidden_states_mask=mask(7).bool(), img_shapes=[[(1, 3, 5)]] * 2,
        ), in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 4, 8)),
    case("QwenImage21Transformer2DModel", qwen_21, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, context_in_dim=12, axes_dims_rope=(4, 4, 8)),
    case("NucleusMoEImageTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 15, 4), encoder_hidden_states=r(2, 7, 12), timestep=times(),
            encoder_hidden_states_mask=mask(7).bool(), img_shapes=[(1, 3, 5)] * 2,
        ), in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, joint_attention_dim=12,
        axes_dims_rope=(4, 4, 8), dense_moe_strategy="leave_first_block_dense", num_experts=4,
        moe_intermediate_dim=16, capacity_factors=2.0),
    case("HiDreamImageTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), timesteps=times(7, 3), pooled_embeds=r(2, 10),
            encoder_hidden_states_t5=r(2, 7, 12), encoder_hidden_states_llama3=r(4, 2, 5, 14),
        ), patch_size=2, in_channels=4, caption_channels=(12, 14), text_emb_dim=10,
        axes_dims_rope=(8, 4, 4), max_resolution=(8, 16), llama_layers=(0, 1, 2, 3), **BLOCKS),
    case("Lumina2Transformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), timestep=times(), encoder_hidden_states=r(2, 7, 12),
            encoder_attention_mask=mask(7),
        ), sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=2,
        num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16), cap_feat_dim=12),
    case("LuminaNextDiT2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), timestep=times(), encoder_hidden_states=r(2, 7, 12),
            encoder_mask=mask(7), image_rotary_emb=turns(r, 4, 6, 4), cross_attention_kwargs={},
        ), sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, cross_attention_dim=12),
    case("ZImageTransformer2DModel",
        lambda r: give(
            x=[r(4, 1, 8, 12), r(4, 1, 8, 12)], t=times(), cap_feats=[r(5, 12), r(7, 12)],
        ), in_channels=4, dim=32, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
        cap_feat_dim=12, axes_dims=[8, 4, 4], axes_lens=[128, 32, 32]),
    case("BriaFibo2Transformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), timestep=times(), encoder_hidden_states=r(2, 3, 9, 12),
            encoder_attention_mask=mask(9, off=4).bool(), context_latents=[r(2, 4, 4, 6)],
        ), in_channels=4, dim=32, n_layers=3, n_refiner_layers=2, n_heads=2, cap_feat_dim=12,
        injection_layer_ids=(0, 2), perceiver_num_layers=2, min_num_gist_tokens=4,
        max_num_gist_tokens=8, gist_step=2, gist_min_text_len=3, gist_max_text_len=9,
        axes_dims=(8, 4, 4), axes_lens=(64, 16, 16)),
    case("ErnieImageTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 3, 5), timestep=times(7, 3), text_bth=r(2, 7, 12),
            text_lens=torch.tensor([5, 7]),
        ), hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4,
        out_channels=4, text_in_dim=12, rope_axes_dim=(8, 4, 4)),
    case("Ideogram4Transformer2DModel", ideogram, in_channels=4, num_layers=2,
        attention_head_dim=24, num_attention_heads=2, intermediate_size=32, adaln_dim=8,
        llm_features_dim=12, mrope_section=(4, 4, 4)),
    case("Krea2Transformer2DModel",
        lambda r: give(
            hidden_states=r(2, 15, 4), encoder_hidden_states=r(2, 7, 3, 16), timestep=times(),
            position_ids=torch.cat([torch.zeros(7, 3), grid(1, 3, 5)]),
            encoder_attention_mask=mask(7).bool(),
        ), in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16,
        num_text_layers=3, text_num_attention_heads=4, text_num_key_value_heads=2,
        text_intermediate_size=24, axes_dims_rope=(8, 4, 4)),
    case("OmniGenTransformer2DModel", omnigen, in_channels=4, hidden_size=32,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=2,
        pad_token_id=0, vocab_size=20, pos_embed_max_size=8, time_step_dim=16,
        rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}),
    case("PRXTransformer2DModel",
        lambda r: give(
            hidden_states=r(2, 4, 8, 12), timestep=times(), encoder_hidden_states=r(2, 7, 12),
            attention_mask=mask(7).bool(),
        ), in_channels=4, context_in_dim=12, hidden_size=32, num_heads=2, depth=2,
        axes_dim=[8, 8], bottleneck_size=8, resolution_embeds=True),
    case("JoyImageEditTransformer3DModel",
        lambda r: give(
            hidden_states=r(2, 2, 4, 1, 6, 10), timestep=times(7, 3),
            encoder_hidden_states=r(2, 7, 12),
        ), in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2,
        rope_dim_list=[8, 4, 4]),
    case("JoyImageEditPlusTransformer3DModel",
        lambda r: give(
            hidden_states=r(2, 21, 4, 1, 2, 2), timestep=times(7, 3),
            encoder_hidden_states=r(2, 7, 12), encoder_hidden_states_mask=mask(7).float(),
            shape_list=[[(1, 3, 5), (1, 2, 3)], [(1, 3, 5)]],
        ), in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, num_layers=2,
        rope_dim_list=[8, 4, 4]),
]
