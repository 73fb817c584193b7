"""Tiny random models of transformers' model types: a config made small, every parameter a random number of its own."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

OLD = transformers.__version__.startswith("4.")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "embedding_size": 32,
    "word_embed_proj_dim": 32, "projection_dim": 32, "mm_hidden_size": 32, "out_hidden_size": 32,
    "text_embed_dim": 32, "output_dim": 32, "intermediate_size": 48, "ffn_dim": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "n_inner": 48, "d_ff": 48, "ffn_hidden_size": 48, "hidden_dim": 48,
    "feed_forward_proj_dim": 48, "mlp_dim": 48, "shared_intermediate_size": 40, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40, "expert_ffn_hidden_size": 24, "intermediate_size_mlp": 56,
    "expert_intermediate_size": 24, "moe_shared_expert_intermediate_size": 40, "block_ff_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "depth": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "global_head_dim": 8, "d_kv": 8, "attention_head_size": 8, "vocab_size": 96,
    "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_source_positions": 64,
    "max_target_positions": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1,
    "num_dense_layers": 1, "q_lora_rank": 12, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "image_size": 16, "patch_size": 4, "spatial_patch_size": 4, "num_channels": 3,
    "num_mel_bins": 16, "window_size": 8, "mamba_d_state": 4, "mamba_d_conv": 4, "mamba_expand": 2,
    "mamba_dt_rank": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "pooler_output_size": 32, "query_pre_attn_scalar": 8,
    "sliding_window": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "laurel_rank": 4,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "resampler_n_latents": 4, "mm_tokens_per_image": 4,
    "pixel_shuffle_ratio": 0.5,  "max_window_layers": 1,
    "rotary_dim": 4, "num_global_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "moe_latent_size": None, "qk_head_dim": 12,
    "encoder_hidden_size": 32, "patch_embed_hidden_size": 48, "latent_query_num": 2, "projection_size": 32,
    "num_query_tokens": 2,
}  # fmt: skip
"""Field of a config -> a small value; fields that a config does not have are left out."""

TOKENS = (
    "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "image_token_id", "image_token_index",
    "video_token_id", "video_token_index", "vision_start_token_id", "vision_end_token_id", "audio_token_id",
    "audio_token_index", "boi_token_id", "eoi_token_id", "boi_token_index", "eoi_token_index", "sep_token_id",
    "image_start_token_id", "image_end_token_id", "unk_token_id", "mask_token_id", "image_break_token_id",
)  # fmt: skip

MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [1, 1, 2]}
SLIDING = ["sliding_attention", "full_attention"]
VQ = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32, "resolution": 16}

OWN: dict[str, dict[str, Any]] = {
    "longcat_flash": {"zero_expert_num": 2, "head_dim": 4, "num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2], "num_shared_expert": [1, 1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "bloom": {"hidden_size": 32},
    "falcon": {"num_kv_heads": 4, "ffn_hidden_size": 48},
    "mpt": {"expansion_ratio": 2},
    "xlm": {"emb_dim": 32, "n_words": 96},
    "ctrl": {"n_embd": 32, "dff": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "phi3": {"original_max_position_embeddings": 64},
    "qwen2_moe": {"decoder_sparse_step": 1},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "llama4_text": {
        "interleave_moe_layer_step": 1,
        "intermediate_size": 24,
        "moe_layers": [0, 1],
        "no_rope_layers": [1, 0],
    },
    "mllama_vision_model": {
        "num_global_layers": 1,
        "intermediate_layers_indices": [0],
        "vision_output_dim": 64,
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    },
    "idefics2_perceiver": {"resampler_n_heads": 4, "resampler_head_dim": 8},
    "idefics": {"vision_config": None},
    "idefics_vision": {"embed_dim": 32},
    "idefics_perciever": {"resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 8},
    "qwen2_5_vl_vision": {"fullatt_block_indexes": [1], "out_hidden_size": 32},
    "qwen3_vl_vision": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_layer_end_index": 1, "moe_k": 2, "moe_capacity": [4, 4, 4]},
    "granitemoehybrid": {
        "layer_types": ["attention", "mamba"] if OLD else ["full_attention", "linear_attention"],
        "mamba_n_groups": 1,
    },
    "dbrx": {
        "max_seq_len": 64,
        "attn_config.rope_theta": 10000.0,
        "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0,
    },
    "llava": {"vision_feature_layer": -1},
    "vipllava": {"vision_feature_layers": [-1, -1]},
    "llava_onevision": {"vision_feature_layer": -1},
    "llava_next": {"vision_feature_layer": -1, "image_grid_pinpoints": [[16, 16]]},
    "got_ocr2": {"image_seq_length": 4},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [4, 4]},
    "internvl": {"vision_feature_layer": -1, "image_seq_length": 4},
    "mistral3": {"spatial_merge_size": 2, "vision_feature_layer": -1},
    "t5": {"d_ff": 48},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
    },
    "nemotron_h": {"hybrid_override_pattern": "M*"},
    "zamba2": {
        "hybrid_layer_ids": [1],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "chunk_size": 8,
        "mamba_headdim": 8,
    },
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "vit_mae": {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 48,
    },
    "wav2vec2": {
        "conv_dim": [16, 16],
        "conv_kernel": [3, 3],
        "conv_stride": [2, 2],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
    "opt": {"ffn_dim": 48},
    "gptj": {"rotary_dim": 4},
    "deepseek_v2": {"head_dim": 4, "num_key_value_heads": 4, "num_experts_per_tok": 2},
    "blip-2": {"image_token_index": 5},
    "instructblip": {"image_token_index": 5},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_stages": 4},
    "deepseek_v3": {"n_group": 1, "head_dim": 4, "num_key_value_heads": 4},
    "glm4_moe_lite": {"head_dim": 4, "num_key_value_heads": 4},
    "gemma4_text": {"per_layer_config": {1: {"head_dim": 8}}, "layer_types": SLIDING},
    "gemma4_unified_text": {"per_layer_config": {1: {"head_dim": 8}}, "layer_types": SLIDING},
    "embedding_gemma2_text": {"per_layer_config": {1: {"head_dim": 8}}, "layer_types": SLIDING},
    "qwen3_vl_text": {"rope_parameters": MROPE},
    "qwen3_vl_moe_text": {"rope_parameters": MROPE},
    "qwen2_vl_text": {"rope_parameters": MROPE},
    "qwen2_5_vl_text": {"rope_parameters": MROPE},
    "glm4v_text": {"rope_parameters": MROPE},
    "Glm4vMoe_text": {"rope_parameters": MROPE},
    "mllama_text_model": {
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    },
    "moonshine": {
        "encoder_num_attention_heads": 4,
        "encoder_num_key_value_heads": 4,
        "decoder_num_attention_heads": 4,
        "decoder_num_key_value_heads": 4,
    },
    "hy_v4_vl_text": {"qk_rope_head_dim": 8, "qk_head_dim": 16},
    "glm4v_moe_text": {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [24, 16], "rope_parameters": MROPE},
    "chameleon": {"vocabulary_map": {"<image>": 90, **{f"IMGIMG{letter}Z": 91 + n for n, letter in enumerate("AB")}}},
    "chameleon_vqgan": VQ,
    "emu3": {
        "vocabulary_map": {
            "<image>": 90,
            "<|extra_200|>": 91,
            **{f"<|visual token {n:06}|>": 92 + n for n in range(4)},
        },
    },
    "emu3_vqgan": {**VQ, "codebook_size": 4, "latent_channels": 4, "embed_dim": 4, "temporal_downsample_factor": 2},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0], "adapter_config.vit_layers": [1, 0]},
    "wav2vec2-bert": {"vocab_size": 96, "feature_projection_input_dim": 16, "position_embeddings_type": None},
    "perception_lm": {
        "vision_config.architecture": "vit_pe_lang_large_patch14_448",
        "vision_config.model_args": {
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 4,
            "img_size": [16, 16],
            "patch_size": 4,
            "ref_feat_shape": [4, 4],
            "global_pool": "",
            "init_values": 0.1,
            "use_post_transformer_norm": False,
        },
        "image_token_id": 5,
    },
    "bamba": {"attn_layer_indices": [1]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4},
    "phi": {"partial_rotary_factor": 0.5},
    "mobilebert": {"embedding_size": 16},
    "moshi": {"audio_encoder_config.num_quantizers": 8},
    "kimi_k25": {"tie_word_embeddings": False},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 2, "qk_rope_head_dim": 0, "qk_head_dim": 8},
    "xlnet": {"d_head": 8},
    "reformer": {"is_decoder": True},
    "mistral_large4_text": {"head_dim": 4},
    "step3p5_vision": {"mlp_ratio": 1.5},
    "minimax_m3_vl": {"merged_hidden_size": 128, "projector_hidden_size": 32},
    "muse_spark_vision": {"num_hidden_layers": 4, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
    "zaya": {"num_experts_per_tok": 1},
    "hunyuan_vl": {"vision_config.text_hidden_size": 32},
    "hunyuan_vl_text": {"head_dim": 8},
    "inkling2": {"vision_config.text_hidden_size": 32},
    "inkling_mm_model": {"vision_config.text_hidden_size": 32},
    "inkling2_text": {"unpadded_vocab_size": 96},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "1/4"},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 24},
    "cohere_compass_text": {"rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}},
    "dots3_note": {"vision_config.adapter_out_dim": 32, "audio_config.adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "layer_types": ["indexed_attention"] * 2,
        "per_layer_config": {},
        "rope_parameters": {
            "indexed_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        },
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 4,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
    },
    "qwen4_exp_vision": {"num_position_embeddings": 16},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_word_timestamp": {"num_key_value_heads": 4, "blank_token_id": 95},
    "inkling2_loop": {"vision_config.text_hidden_size": 32},
    "inkling2_loop_text": {"unpadded_vocab_size": 96},
    "vibevoice_acoustic_tokenizer_encoder": {
        "num_filters": 4,
        "depths": [1, 1, 1],
        "downsampling_ratios": [2, 2],
        "hidden_size": 16,
    },
    "vibevoice_asr": {"acoustic_tokenizer_chunk_size": 64},
    "mimi": {
        "num_filters": 4,
        "upsample_groups": 32,
        "codebook_size": 16,
        "codebook_dim": 8,
        "num_quantizers": 3,
        "vector_quantization_hidden_dimension": 8,
        "upsampling_ratios": [2, 2],
    },
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "gradium_phonon_tts": {"flow_head_config.condition_dim": 32, "num_key_value_heads": 4},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 40},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "jev": {"num_verbalizers": 24, "offsets": {"noul": 0, "score": 2, "choice": 8}},
    "maskformer": {
        "backbone_config.depths": [1, 1, 1, 1],
        "backbone_config.num_heads": [1, 1, 2, 2],
        "backbone_config.num_layers": 4,
        "backbone_config.stage_names": ["stem", "stage1", "stage2", "stage3", "stage4"],
        "backbone_config._out_features": ["stage1", "stage2", "stage3", "stage4"],
        "backbone_config._out_indices": [1, 2, 3, 4],
        "fpn_feature_size": 32,
        "decoder_config.num_queries": 4,
    },
    "d_fine": {
        "backbone_config._out_features": ["stage2", "stage3", "stage4"],
        "backbone_config._out_indices": [2, 3, 4],
        "encoder_in_channels": [24, 32, 40],
        "encoder_hidden_dim": 32,
        "decoder_in_channels": [32, 32, 32],
        "num_queries": 5,
        "max_num_bins": 4,
        "lqe_hidden_dim": 8,
        "encoder_layers": 1,
        "depth_mult": 0.34,
    },
    "qwen3_omni_moe": {"talker_config.spatial_merge_size": 2},
    "hgnet_v2": {
        "stem_channels": [3, 4, 8],
        "stage_in_channels": [8, 16, 24, 32],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [16, 24, 32, 40],
        "hidden_sizes": [16, 24, 32, 40],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [2, 2, 2, 2],
    },
    "radio": {"max_img_size": 16, "patch_dim": 48},
    "tipsv2_dpt": {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "num_depth_bins": 8},
    "nemotron3_diarization": {"head_config.audio_hidden_size": 32},
    "autoformer": {"prediction_length": 4, "context_length": 8, "label_length": 2, "feature_size": 9},
    "llama4_vision_model": {
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
    },
}
"""model_type -> fields with values of their own, over those above."""

PER_LAYER = (
    "layer_types", "mlp_layer_types", "no_rope_layers", "moe_layer_freq", "layers_block_type", "rope_layers",
    "kv_source_layers", "indexer_types", "num_attention_heads_per_layer",
)  # fmt: skip
"""Fields with one entry a layer: cut to as many as there are layers."""

CLASSES = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES", "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES", "MODEL_MAPPING_NAMES",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "electra", "vit", "clip", "siglip")
FIRST = {
    "clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model", "bart": "BartForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration", "colqwen2": "ColQwen2ForRetrieval",
    "depth_anything": "DepthAnythingForDepthEstimation",
    "prompt_depth_anything": "PromptDepthAnythingForDepthEstimation", "zoedepth": "ZoeDepthForDepthEstimation",
    "chmv2": "CHMv2ForDepthEstimation",
    "pp_doclayout_v2": "PPDocLayoutV2ForObjectDetection", "tipsv2_dpt": "Tipsv2DptForDepthEstimation",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
    "shieldgemma2": "ShieldGemma2ForImageClassification", "jev": "JevForDecision",
    "maskformer": "MaskFormerForInstanceSegmentation", "d_fine": "DFineForObjectDetection",
    "vibevoice_asr": "VibeVoiceAsrForConditionalGeneration",
    "gradium_phonon_tts": "GradiumPhononTTSForConditionalGeneration", "autoformer": "AutoformerForPrediction",
    "pp_doclayout_v3": "PPDocLayoutV3ForObjectDetection", "pp_doclayout_v4": "PPDocLayoutV4ForObjectDetection",
    "nemo_speechlm": "Nemotron3_5TranscribeForConditionalGeneration",
    "bigbird_pegasus": "BigBirdPegasusForConditionalGeneration", "blenderbot": "BlenderbotForConditionalGeneration",
    "blenderbot-small": "BlenderbotSmallForConditionalGeneration",
    "mbart": "MBartForConditionalGeneration", "mvp": "MvpForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration", "plbart": "PLBartForConditionalGeneration",
    "prophetnet": "ProphetNetForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
}  # fmt: skip


def small_config(model_type: str) -> PretrainedConfig:
    """The default config of a model type, or of a class of transformers, made small."""
    kind: Any = getattr(transformers, model_type, None)
    is_class = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    config = kind.config_class() if is_class else AutoConfig.for_model(model_type)
    _shrink(config)
    return config


def _shrink(config: PretrainedConfig) -> None:
    # Gemma 4 has heads of several sizes, and refuses to tell one unless it is asked this way.
    if hasattr(config, "allow_global_per_layer_attribute_access"):
        config.allow_global_per_layer_attribute_access = True
    names = [name for name in vars(config) if not name.startswith("_")]
    mapped = getattr(type(config), "attribute_map", {})
    for name in names:
        value = getattr(config, name)
        if isinstance(value, PretrainedConfig):
            _shrink(value)
    for name, value in SIZES.items():
        if (name in names or name in mapped) and isinstance(getattr(config, name, None), (int, float)):
            _set(config, name, value)
    for name in TOKENS:
        if isinstance(getattr(config, name, None), int):
            _set(config, name, TOKENS.index(name) + 1 if getattr(config, name) >= 0 else getattr(config, name))
        elif isinstance(getattr(config, name, None), list):
            _set(config, name, [TOKENS.index(name) + 1])
    layers = getattr(config, "num_hidden_layers", None)
    for name in PER_LAYER:
        if isinstance(getattr(config, name, None), list) and isinstance(layers, int):
            kinds = list(dict.fromkeys(getattr(config, name)))
            _set(config, name, (kinds * layers)[:layers] if len(kinds) > 1 else getattr(config, name)[:layers])
    for name, value in OWN.get(config.model_type, {}).items():
        if value is not None or not isinstance(getattr(config, name, None), PretrainedConfig):
            _set(config, name, copy.deepcopy(value))
    own = OWN.get(config.model_type, {})
    if OLD and "rope_parameters" in own:
        config.rope_scaling = copy.deepcopy(own["rope_parameters"])
    if isinstance(getattr(config, "stage_names", None), list):
        last = len(config.depths) if hasattr(config, "depths") else layers
        _set(config, "stage_names", ["stem", *(f"stage{n + 1}" for n in range(last))])
        _set(config, "_out_features", [f"stage{last}"])
        _set(config, "_out_indices", [last])
    parameters = getattr(config, "rope_parameters", None)
    if isinstance(parameters, dict) and isinstance(parameters.get("mrope_section"), list):
        parameters["mrope_section"] = [1, 1, 2]


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    inner, _, rest = name.partition(".")
    if rest:
        _set(getattr(config, inner), rest, value)
        return
    try:
        setattr(config, name, value)
    except (AttributeError, NotImplementedError):
        return


def class_of(model_type: str) -> type[PreTrainedModel]:
    """The class with a head that its models are mostly loaded as; a class's own name gives the class."""
    if isinstance(getattr(transformers, model_type, None), type):
        return getattr(transformers, model_type)  # type: ignore[no-any-return]
    if model_type in FIRST:
        return getattr(transformers, FIRST[model_type])  # type: ignore[no-any-return]
    for mapping in CLASSES:
        name = getattr(modeling_auto, mapping).get(model_type)
        if name is not None:
            return getattr(transformers, name if isinstance(name, str) else name[0])  # type: ignore[no-any-return]
    raise KeyError(model_type)


def tiny(model_type: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A tiny model in float32 with random parameters, ready to run; `fields` are of its config."""
    torch.manual_seed(seed)
    kind = class_of(model_type)
    config = small_config(model_type)
    for name, value in fields.items():
        _set(config, name, value)
    wanted = kind.config_class
    if wanted is not None and isinstance(getattr(config, "text_config", None), wanted):
        config = config.text_config
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                scale = 0.1 if parameter.ndim > 1 else 0.05
                noise = torch.randn(parameter.shape) * scale
                norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1 + noise if norm else noise)
    return model
