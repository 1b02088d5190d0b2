"""Transformers for sound, notes and proteins: 11 places in a row."""

from __future__ import annotations

import torch
from attention.denoiser_case import case, give, mask, times

# fmt: off
CASES = [
    case("AceStepTransformer1DModel",
        lambda r: give(
            hidden_states=r(2, 11, 4), timestep=times(), timestep_r=times(0.1, 0.2),
            encoder_hidden_states=r(2, 7, 12), context_latents=r(2, 11, 6),
        ), hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, in_channels=10, audio_acoustic_hidden_dim=4,
        sliding_window=2, encoder_hidden_size=12),
    case("LongCatAudioDiTTransformer",
        lambda r: give(
            hidden_states=r(2, 11, 4), encoder_hidden_states=r(2, 7, 12), timestep=times(),
            encoder_attention_mask=mask(7).bool(), attention_mask=mask(11, off=3).bool(),
            latent_cond=r(2, 11, 4),
        ), dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4),
    case("MiniMaxMusic3Transformer1DModel",
        lambda r: give(
            hidden_states=r(2, 4, 11), encoder_hidden_states=r(2, 11, 12), timestep=times(),
        ), in_channels=4, condition_dim=12, num_layers=2, num_attention_heads=2,
        attention_head_dim=16, ff_inner_dim=32, rotary_dim=8, fourier_embedding_dim=16),
    case("StableAudioDiTModel",
        lambda r: give(
            hidden_states=r(2, 4, 11), encoder_hidden_states=r(2, 7, 10), timestep=times(),
            global_hidden_states=r(2, 1, 14), encoder_attention_mask=mask(7).bool(),
            attention_mask=mask(11, off=3).bool(),
            rotary_embedding=(r(12, 8).cos(), r(12, 8).sin()),
        ), sample_size=11, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=4, num_key_value_attention_heads=2, out_channels=4,
        cross_attention_dim=32, time_proj_dim=16, global_states_input_dim=14,
        cross_attention_input_dim=10),
    case("StableAudio3DiTModel",
        lambda r: give(
            hidden_states=r(2, 4, 11), encoder_hidden_states=r(2, 7, 10), timestep=times(),
            global_hidden_states=r(2, 14), encoder_attention_mask=mask(7),
            local_add_cond=r(2, 5, 11),
        ), io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=10,
        global_cond_dim=14, local_add_cond_dim=5, timestep_features_dim=16, num_memory_tokens=3),
    case("T5FilmDecoder",
        lambda r: give(
            encodings_and_masks=[(r(2, 7, 16), mask(7)), (r(2, 5, 16), mask(5))],
            decoder_input_tokens=r(2, 11, 4), decoder_noise_time=times(),
        ), input_dims=4, targets_length=11, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=32),
    case("RFD4ProteinaTransformer",
        lambda r: give(
            bb_ca=r(2, 11, 3), local_latents=r(2, 11, 4), bb_ca_time=times(),
            local_latents_time=times(0.2, 0.6), padding_mask=mask(11, off=3).bool(),
            conditioning={
                "is_in_context_conditioning": torch.zeros(2, 11),
                "supports_local_latent": torch.ones(2, 11),
            },
        ), nlayers=3, token_dim=32, nheads=2, dim_cond=16, pair_repr_dim=12, latent_dim=4,
        t_emb_dim=16, xt_pair_dist_dim=6, tri_mult_c=8, num_sequence_classes=5,
        feats_seq=("xt_bb_ca", "xt_local_latents"), feats_pair_repr=("xt_bb_ca_pair_dists",),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_cond=("time_emb_bb_ca",)),
]
