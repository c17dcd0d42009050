"""Tiny random models of the families that mix attention with recurrences and convolutions."""

import contextlib

import pytest
import torch
import transformers

VOCABULARY = 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {"intermediate_size": 48}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"]}
DELTA = LINEAR | {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 32,
}
CONV = {"layer_types": ["conv", "conv", "full_attention", "conv"]}

# Family -> configuration class, causal language model, options.
FAMILIES = {
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DENSE | DELTA | {"head_dim": 8}),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        DELTA | EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        DENSE | DELTA | EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 24},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", DENSE | DELTA | {"linear_num_key_heads": 4}),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        DENSE | LINEAR | EXPERTS | LATENT | {"linear_num_heads": 4, "linear_head_dim": 8, "q_lora_rank": None},
    ),
    "bailing_hybrid": (
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        DENSE
        | LINEAR
        | EXPERTS
        | LATENT
        | {"head_dim": 8, "q_lora_rank": 16, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0},
    ),
    "lara_mini": (
        "LaraMiniConfig",
        "LaraMiniForCausalLM",
        DELTA
        | EXPERTS
        | {
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "sliding_window": 24,
            "layer_types": ["linear_attention", "sliding_attention", "full_attention", "linear_attention"],
        },
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", DENSE | MAMBA | {"attn_layer_indices": [2]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        DENSE
        | MAMBA
        | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "shared_intermediate_size": 24}
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        DENSE
        | {"layers_block_type": ["mamba", "mlp", "attention", "mamba"], "head_dim": 8, "mamba_num_heads": 4}
        | {"mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 32},
    ),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", DENSE | MAMBA | {"mamba_d_ssm": 64, "head_dim": 8}),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        DENSE
        | {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"], "mamba_d_state": 8, "n_mamba_heads": 4}
        | {"mamba_ngroups": 2, "chunk_size": 32, "num_key_value_heads": 4, "num_mem_blocks": 1}
        | {"hybrid_layer_ids": [2], "mamba_headdim": 16},
    ),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", DENSE | CONV | {"block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", DENSE | CONV | EXPERTS | {"num_dense_layers": 1}),
    "lfm3": (
        "Lfm3Config",
        "Lfm3ForCausalLM",
        DENSE
        | {"head_dim": 8, "sliding_window": 24}
        | {"layer_types": ["conv", "sliding_attention", "full_attention", "conv"]},
    ),
}


def tiny(family: str, dtype=torch.float32, **options):
    """Random weights, large enough that every layer matters, and states that live for hundreds of tokens: as they are
    initialised, they forget within a few, which would hide a leak from one branch into another."""
    config_name, model_name, own = FAMILIES[family]
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    config = getattr(transformers, config_name)(**COMMON | own | options)
    torch.manual_seed(0)
    try:
        model = getattr(transformers, model_name)._from_config(
            config, attn_implementation="flexmask", dtype=torch.float32
        )
    except NotImplementedError as error:
        if "in this version of transformers" in str(error):
            pytest.skip(str(error))
        raise
    with contextlib.suppress(AttributeError, ValueError):
        model.set_experts_implementation("eager")  # the grouped product does not take float64
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                weights.normal_(std=1.0 if "embed" in name else weights.shape[-1] ** -0.5)
            if name.endswith("A_log"):
                weights.uniform_(0.003, 0.3).log_()
    return model.to(dtype).train()
