"""Transformers for video: 2 or 3 frames of 3 x 5 tokens, text of 7 tokens."""

from __future__ import annotations

from typing import Any

import torch
from attention.denoiser_case import Draw, case, give, grid, mask, times

# fmt: off
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
IN_OUT: dict[str, Any] = {"in_channels": 4, "out_channels": 4}
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 12, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}
# the processors of Wan take the 512 last tokens for text, those before them for an image
WAN_IMAGE: dict[str, Any] = {**WAN, "image_dim": 10, "added_kv_proj_dim": 24}
HUNYUAN: dict[str, Any] = {
    **HEADS, **IN_OUT, "num_refiner_layers": 2, "text_embed_dim": 12, "rope_axes_dim": (4, 6, 6),
}
LTX2: dict[str, Any] = {
    **HEADS, **IN_OUT, "cross_attention_dim": 32, "gated_attn": True, "cross_attn_mod": True,
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "audio_gated_attn": True,
    "audio_cross_attn_mod": True, "caption_channels": 12,
}
KANDINSKY: dict[str, Any] = {
    "in_text_dim": 12, "in_text_dim2": 10, "time_dim": 16, "model_dim": 32, "ff_dim": 32,
    "num_text_blocks": 2, "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "in_visual_dim": 4,
    "out_visual_dim": 4, "visual_cond": True,
}


def clip(r: Draw, **more: Any) -> dict[str, Any]:
    """Two videos of 3 frames, 4 channels, 6 x 10, and texts."""
    return give(
        hidden_states=r(2, 4, 3, 6, 10), timestep=times(7, 3), encoder_hidden_states=r(2, 7, 12),
    ) | more


def of_image(r: Draw, **more: Any) -> dict[str, Any]:
    texts = {"encoder_hidden_states": r(2, 512, 12), "encoder_hidden_states_image": r(2, 3, 10)}
    return clip(r) | texts | more


def allegro(r: Draw) -> dict[str, Any]:
    """The first video lacks its last two columns of tokens; a table of rotary positions an axis."""
    seen = torch.ones(2, 3, 6, 10)
    seen[0, ..., 6:] = 0
    tables = [(r(size, 4).cos(), r(size, 4).sin()) for size in (3, 3, 5)]
    places = [axis[None].long() for axis in grid(3, 3, 5).T]
    return clip(
        r, attention_mask=seen, encoder_attention_mask=mask(7), image_rotary_emb=(tables, places),
    )


def packed_clip(r: Draw, **more: Any) -> dict[str, Any]:
    """As rows of 30 tokens: 2 frames of 3 x 5."""
    return give(
        hidden_states=r(2, 30, 4), encoder_hidden_states=r(2, 7, 12), timestep=times(7, 3),
        encoder_attention_mask=mask(7),
    ) | more


def cosmos_3(r: Draw) -> dict[str, Any]:
    """One row: 5 words, 12 tokens of video (2 frames of 2 x 3), 4 of sound."""
    return give(
        input_ids=r.below(20, 5), text_indexes=torch.arange(5), und_len=5, sequence_length=21,
        position_ids=r.below(9, 3, 21), vision_tokens=[r(1, 4, 2, 4, 6)],
        vision_token_shapes=[(2, 2, 3)], vision_sequence_indexes=torch.arange(5, 17),
        vision_mse_loss_indexes=torch.arange(5, 17), vision_timesteps=torch.full((12,), 300.0),
        vision_noisy_frame_indexes=[torch.arange(2)], sound_tokens=[r(4, 4)],
        sound_token_shapes=[(4, 1, 1)], sound_sequence_indexes=torch.arange(17, 21),
        sound_mse_loss_indexes=torch.arange(17, 21), sound_timesteps=torch.full((4,), 300.0),
        sound_noisy_frame_indexes=[torch.arange(4)],
    )


def minimax(r: Draw) -> dict[str, Any]:
    """One row: 7 words, 30 tokens of video, 4 of sound."""
    tags = torch.tensor([0] * 7 + [1] * 30 + [2] * 4)
    return give(
        hidden_states=r(1, 30, 16), audio_hidden_states=r(1, 4, 6),
        encoder_hidden_states=r(1, 7, 12), timestep=times(0, 700),
        timestep_indices=tags.clamp(max=1), token_tags=tags, position_ids=r.below(9, 41, 3),
        video_indices=torch.arange(7, 37), audio_indices=torch.arange(37, 41),
        text_indices=torch.arange(7),
    )


def sana_wm(r: Draw) -> dict[str, Any]:
    """3 frames of 4 x 6 tokens, each with its camera: a turn, a shift and the lens."""
    turned = torch.linalg.qr(r(2, 3, 3, 3))[0]
    pose = torch.eye(4).repeat(2, 3, 1, 1)
    pose[..., :3, :3], pose[..., :3, 3] = turned, r(2, 3, 3)
    lens = torch.tensor([5.0, 4.0, 3.0, 2.0]).expand(2, 3, 4)
    return clip(
        r, hidden_states=r(2, 4, 3, 4, 6), encoder_hidden_states=r(2, 1, 7, 12),
        timestep=torch.tensor([[[7.0, 7.0, 7.0]], [[0.0, 3.0, 3.0]]]),
        encoder_attention_mask=mask(7), chunk_plucker=r(2, 48, 3, 4, 6),
        camera_conditions=torch.cat([pose.flatten(2), lens], -1),
    )


def wan_animate_2(r: Draw) -> dict[str, Any]:
    """The pass over the reference frames. The pass that generates compiles a mask, for 25 s."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return give(
        hidden_states=[r(2, 2, 6, 8), r(2, 2, 6, 8)], timestep=times(7, 3),
        condition_latents=[r(2, 2, 6, 8), r(2, 2, 6, 8)],
        encoder_hidden_states=[r(5, 12), r(7, 12)], kv_cache=WanAnimate2KVCache(2),
        kv_cache_mode="extract", seq_len=24, encoder_hidden_states_image=r(2, 3, 1280),
        offset_grid_sizes=torch.tensor([[2, 3, 4]] * 2),
    )


CASES = [
    case("AllegroTransformer3DModel", allegro, num_attention_heads=2, attention_head_dim=12,
        num_layers=2, cross_attention_dim=24, sample_height=6, sample_width=10, sample_frames=3,
        caption_channels=12, **IN_OUT),
    case("AnyFlowTransformer3DModel",
        lambda r: of_image(r, hidden_states=r(2, 3, 4, 6, 10), timestep=r(2, 3), r_timestep=r(2, 3),
            encoder_hidden_states=r(2, 7, 12)),
        image_dim=10, **WAN, **IN_OUT),
    case("AnyFlowFARTransformer3DModel",
        lambda r: clip(r, hidden_states=r(2, 4, 4, 8, 12), timestep=r(2, 4), r_timestep=r(2, 4),
            chunk_partition=(1, 1, 2)),
        full_chunk_limit=2, chunk_partition=(1, 1, 2), **WAN, **IN_OUT),
    case("ChronoEditTransformer3DModel", of_image, **WAN_IMAGE, **IN_OUT),
    case("CogVideoXTransformer3DModel",
        lambda r: clip(r, hidden_states=r(2, 3, 4, 6, 10), ofs=times(2, 2),
            image_rotary_emb=(r(45, 16).cos(), r(45, 16).sin())),
        time_embed_dim=8, ofs_embed_dim=8, text_embed_dim=12, sample_width=10, sample_height=6,
        sample_frames=9, max_text_seq_length=7, use_rotary_positional_embeddings=True,
        **HEADS, **IN_OUT),
    case("ConsisIDTransformer3DModel",
        lambda r: clip(r, hidden_states=r(2, 3, 4, 6, 10), id_cond=r(2, 10),
            id_vit_hidden=[r(2, 5, 16), r(2, 5, 16)],
            image_rotary_emb=(r(45, 16).cos(), r(45, 16).sin())),
        time_embed_dim=8, text_embed_dim=12, sample_width=10, sample_height=6, sample_frames=9,
        max_text_seq_length=7, use_rotary_positional_embeddings=True, is_train_face=True,
        cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=10,
        LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2,
        LFE_num_querie=3, LFE_output_dim=32, LFE_num_scale=2,
        **(HEADS | {"num_attention_heads": 3}), **IN_OUT),
    # the mask of padding needs torchvision; with an image, a mask of the text is an error
    case("CosmosTransformer3DModel",
        lambda r: clip(r, encoder_hidden_states=(r(2, 7, 12), r(2, 3, 10)), fps=16),
        text_embed_dim=12, adaln_lora_dim=8, max_size=(4, 16, 16), concat_padding_mask=False,
        img_context_dim_in=10, img_context_num_tokens=3, img_context_dim_out=32, **HEADS,
        **IN_OUT),
    case("Cosmos3OmniTransformer", cosmos_3, dtype="float32", head_dim=16, hidden_size=32,
        intermediate_size=32, latent_channel=4, num_attention_heads=4, num_hidden_layers=2,
        num_key_value_heads=2, patch_latent_dim=16, sound_dim=4, sound_gen=True, vocab_size=20,
        rope_axes_dim=(4, 2, 2)),
    case("EasyAnimateTransformer3DModel",
        lambda r: clip(r, encoder_hidden_states_t5=r(2, 5, 10)),
        patch_size=2, mmdit_layers=2, time_embed_dim=8, text_embed_dim=12, text_embed_dim_t5=10,
        **(HEADS | {"num_layers": 4}), **IN_OUT),
    case("HeliosTransformer3DModel",
        lambda r: clip(r, indices_hidden_states=torch.arange(7, 10).expand(2, 3),
            indices_latents_history_short=torch.tensor([[6], [6]]),
            indices_latents_history_mid=torch.arange(4, 6).expand(2, 2),
            indices_latents_history_long=torch.arange(4).expand(2, 4),
            latents_history_short=r(2, 4, 1, 6, 10), latents_history_mid=r(2, 4, 2, 6, 10),
            latents_history_long=r(2, 4, 4, 6, 10)),
        num_attention_heads=2, attention_head_dim=12, text_dim=12, freq_dim=16, ffn_dim=32,
        num_layers=2, rope_dim=(4, 4, 4), is_amplify_history=True, **IN_OUT),
    case("HunyuanVideoTransformer3DModel",
        lambda r: clip(r, encoder_attention_mask=mask(7), pooled_projections=r(2, 10),
            guidance=times(1, 2)),
        num_single_layers=2, pooled_projection_dim=10, **HUNYUAN),
    case("HunyuanVideo15Transformer3DModel",
        lambda r: clip(r, hidden_states=r(2, 4, 3, 3, 5), timestep_r=times(5, 1),
            encoder_attention_mask=mask(7), encoder_hidden_states_2=r(2, 5, 10),
            encoder_attention_mask_2=mask(5), image_embeds=r(2, 3, 14)),
        text_embed_2_dim=10, image_embed_dim=14, use_meanflow=True, **HUNYUAN),
    case("HunyuanVideoFramepackTransformer3DModel",
        lambda r: clip(r, encoder_attention_mask=mask(7), pooled_projections=r(2, 10),
            guidance=times(1, 2), image_embeds=r(2, 3, 14), indices_latents=torch.arange(8, 11),
            latents_clean=r(2, 4, 2, 6, 10), indices_latents_clean=torch.tensor([0, 7]),
            latents_history_2x=r(2, 4, 2, 6, 10), indices_latents_history_2x=torch.arange(5, 7),
            latents_history_4x=r(2, 4, 4, 6, 10), indices_latents_history_4x=torch.arange(1, 5)),
        num_single_layers=2, pooled_projection_dim=10, has_image_proj=True, image_proj_dim=14,
        has_clean_x_embedder=True, **HUNYUAN),
    case("Kandinsky5Transformer3DModel",
        lambda r: clip(r, hidden_states=r(2, 3, 6, 10, 9), pooled_projections=r(2, 10),
            visual_rope_pos=[torch.arange(3), torch.arange(3), torch.arange(5)],
            text_rope_pos=torch.arange(7)),
        **KANDINSKY),
    case("Kandinsky6Transformer3DModel",
        lambda r: clip(r, hidden_states=r(2, 3, 6, 10, 9), pooled_projections=r(2, 10),
            audio_hidden_states=r(2, 11, 6), encoder_attention_mask=mask(7).bool()),
        in_audio_dim=6, out_audio_dim=6, ca_rope=True, cross_gates=True, **KANDINSKY),
    case("Kandinsky6SRTransformer3DModel",
        lambda r: give(hidden_states=r(2, 2, 8, 16, 9), timestep=times(7, 3)),
        in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=32, ff_dim=32,
        num_visual_blocks=2, axes_dims=(4, 6, 6)),
    case("LTXVideoTransformer3DModel",
        lambda r: packed_clip(r, timestep=times(7, 3)[:, None], num_frames=2, height=3, width=5),
        cross_attention_dim=32, caption_channels=12, **HEADS, **IN_OUT),
    case("LTX2VideoTransformer3DModel",
        lambda r: packed_clip(r, audio_hidden_states=r(2, 11, 4),
            audio_encoder_hidden_states=r(2, 5, 12), audio_encoder_attention_mask=mask(5),
            sigma=times(), num_frames=2, height=3, width=5, audio_num_frames=11),
        **LTX2),
    case("SanaWMLTX2RefinerTransformer3DModel",  # runs the video half of each block only
        lambda r: packed_clip(r, video_rotary_emb=(r(2, 30, 32).cos(), r(2, 30, 32).sin())),
        idle="audio", **(LTX2 | {"cross_attn_mod": False, "audio_cross_attn_mod": False})),
    case("LatteTransformer3DModel", clip, sample_size=8, patch_size=2, video_length=3,
        cross_attention_dim=32, caption_channels=12, norm_type="ada_norm_single",
        num_embeds_ada_norm=10, norm_elementwise_affine=False, **HEADS, **IN_OUT),
    case("MiniMaxH3Transformer3DModel", minimax, hidden_size=32, num_refiner_layers=2, ffn_dim=32,
        in_channels=4, audio_in_channels=6, text_dim=12, freq_dim=16, time_embed_hidden_dim=16,
        time_embed_dim=8, rope_freq_dim=2, **HEADS),
    case("MochiTransformer3DModel",
        lambda r: clip(r, encoder_hidden_states=r(2, 7, 16), encoder_attention_mask=mask(7).bool()),
        pooled_projection_dim=12, text_embed_dim=16, time_embed_dim=16, max_sequence_length=7,
        **(HEADS | {"num_layers": 3}), **IN_OUT),
    case("MotifVideoTransformer3DModel",
        lambda r: clip(r, encoder_attention_mask=mask(7), image_embeds=r(2, 3, 10)),
        num_single_layers=4, num_decoder_layers=2, text_embed_dim=12, image_embed_dim=10,
        rope_axes_dim=(4, 6, 6), enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True, **HEADS, **IN_OUT),
    case("SanaVideoTransformer3DModel",
        lambda r: clip(r, encoder_attention_mask=mask(7), guidance=times(1, 2)),
        num_attention_heads=2, attention_head_dim=12, num_layers=2, num_cross_attention_heads=4,
        cross_attention_head_dim=6, cross_attention_dim=24, caption_channels=12,
        guidance_embeds=True, **IN_OUT),
    case("SanaWMTransformer3DModel", sana_wm, in_channels=4, num_layers=4, hidden_size=48,
        num_attention_heads=2, linear_head_dim=24, softmax_every_n=2, caption_channels=12,
        chunk_plucker_post_attn_blocks=2),
    case("SkyReelsV2Transformer3DModel", of_image, **WAN_IMAGE, **IN_OUT),
    case("WanTransformer3DModel", of_image, **WAN_IMAGE, **IN_OUT),
    case("WanVACETransformer3DModel",
        lambda r: of_image(r, control_hidden_states=r(2, 6, 3, 6, 10)),
        vace_layers=[0, 1], vace_in_channels=6, **WAN_IMAGE, **IN_OUT),
    case("WanAnimateTransformer3DModel",
        lambda r: of_image(r, hidden_states=r(2, 12, 3, 6, 10),
            pose_hidden_states=r(2, 4, 2, 6, 10), face_pixel_values=r(2, 3, 5, 16, 16)),
        in_channels=12, latent_channels=4, out_channels=4,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16,
        motion_style_dim=8, motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8,
        face_encoder_num_heads=2, inject_face_latents_blocks=1, **WAN_IMAGE),
    case("WanAnimate2Transformer3DModel", wan_animate_2, text_len=8, in_dim=4, dim=24, ffn_dim=32,
        freq_dim=16, text_dim=12, out_dim=2, num_heads=2, num_layers=2),
]
