"""A tiny random model of any architecture that transformers' causal-LM mapping names.

Sizes shrink by field name, one rule for all architectures; what no rule can know is the table
EXCEPTIONS. Imports torch and transformers alone, so that kvpress's environment builds the same.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 384
NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
"""Every entry of transformers' mapping, by model type."""
SPREAD = 0.15
"""Standard deviation of the weights: wide, so that attention is sharp and tokens do not repeat."""

SINKS = 4.0
"""Standard deviation of learned sinks: some heads then give them nearly all their attention."""

SIZES: dict[str, Any] = {
    name: size
    for names, size in (
        ("vocab_size unpadded_vocab_size output_vocab_size vocab_size_per_layer_input", VOCABULARY),
        ("hidden_size d_model n_embd dim embedding_size cross_attention_hidden_size", 64),
        ("adapter_in_dim adapter_out_dim adapter_input_size adapter_output_size", 64),
        ("num_attention_heads n_head n_heads num_heads decoder_attention_heads", 4),
        ("encoder_attention_heads attention_heads swa_num_attention_heads", 4),
        ("num_attention_groups num_key_value_heads num_kv_heads swa_num_key_value_heads", 2),
        ("head_dim dim_head d_kv kv_channels swa_head_dim global_head_dim attention_head_dim", 16),
        ("intermediate_size n_inner ffn_dim ffn_hidden_size dim_ff dff d_ff feed_forward_size", 96),
        ("encoder_ffn_dim decoder_ffn_dim expert_ffn_hidden_size intermediate_size_mlp", 96),
        ("moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size", 32),
        ("shared_experts_intermediate_size moe_shared_expert_intermediate_size", 32),
        ("dense_intermediate_size prefix_dense_intermediate_size", 96),
        ("max_position_embeddings n_positions n_ctx max_seq_len model_max_length", 512),
        ("max_target_positions max_source_positions position_bias_max_distance", 512),
        ("num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num", 4),
        ("num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts", 2),
        ("n_group topk_group num_expert_group", 1),
        ("q_lora_rank o_lora_rank", 24),
        ("kv_lora_rank", 32),
        ("qk_nope_head_dim v_head_dim", 16),
        ("qk_rope_head_dim rotary_dim", 8),
        ("qk_head_dim", 24),
        ("index_head_dim indexer_head_dim", 16),
        ("index_n_heads indexer_n_heads", 2),
        ("index_topk indexer_budget", 16),
        ("linear_num_key_heads linear_num_value_heads linear_num_heads", 4),
        ("linear_key_head_dim linear_value_head_dim linear_head_dim", 16),
        ("mamba_n_heads mamba_num_heads", 8),
        ("mamba_d_head mamba_head_dim mamba_headdim", 16),
        ("mamba_d_ssm", 128),
        ("mamba_d_state state_size ssm_state_size", 16),
        ("mamba_chunk_size chunk_size", 16),
        ("mamba_ngroups mamba_n_groups n_groups o_groups", 1),
        ("mamba_dt_rank time_step_rank", 8),
        ("attention_hidden_size lru_width", 64),
        ("sliding_window window_size sliding_window_size attention_window_size", 16),
        ("attention_window local_attention_window_len", 16),
        ("attention_chunk_size", 32),
        ("hidden_size_per_layer_input laurel_rank gated_norm_rank hc_lowrank", 16),
        ("ple_embed_dim", 32),
        ("ngram_vocab_size_base", 64),
        ("make_ngram_vocab_size_divisible_by", 8),
        ("split_ngram_parts", 4),
        ("query_pre_attn_scalar", 9),
        ("num_kv_shared_layers", 2),
        ("image_size", 28),
        ("patch_size", 14),
        (
            "layerdrop attention_dropout hidden_dropout_prob attention_probs_dropout_prob dropout",
            0.0,
        ),
        ("embd_pdrop attn_pdrop resid_pdrop resid_dropout embed_dropout activation_dropout", 0.0),
        ("residual_dropout router_jitter_noise emb_pdrop", 0.0),
        ("initializer_range init_std initializer_factor", SPREAD),
        ("attention_multiplier", 0.4),
        # A cap far above tiny logits would go unnoticed when it is forgotten.
        ("attn_logit_softcapping", 2.0),
    )
    for name in names.split()
}
"""New values by field name; a field that is None in its config stays so."""

DEPTHS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
]
"""Fields that count layers."""
TOKENS = [
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "sep_token_id",
    "cls_token_id",
    "eod_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
]
"""Fields set to 0, which no prompt holds: the vocabulary is another."""
CYCLED = ("layer_types", "layers_block_type", "layer_types_per_stack", "block_types")
"""Lists of layer kinds that repeat: every kind comes again and again."""
LAYERS = 4
"""Layers, at least; every kind of layer occurs twice."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    # As in checkpoints that are in use.
    "mistral": {"sliding_window": None},
    "ministral": {
        "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    # Attention only where it is asked for.
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "recurrent_gemma": {"num_hidden_layers": 6},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "moe_layers": [1, 3],
    },
    "llama4": {"text_config": {"layer_types": ["chunked_attention", "full_attention"] * 2}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "gemma4_text": {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    # Sizes that must agree with one another.
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "xlstm": {"hidden_size": 128},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"intermediate_size": 96, "activation_sparsity_pattern": None},
    "dory": {
        "num_hidden_layers": 8,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    # Fields without a default that works.
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "blt": {"encoder_hash_byte_group_vocab": 512},
    "mpt": {"attn_config": {}},
    "reformer": {
        "is_decoder": True,
        "num_buckets": 8,
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [16, 32],
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
}
for _name in ("qwen4_exp", "gemma4", "gemma4_unified", "gemma3n"):
    EXCEPTIONS[_name] = {"text_config": EXCEPTIONS[f"{_name}_text"]}
"""Fields by model type; they win over the rules. A dict's fields go to the sub-config of that
name."""


def tiny_config(name: str) -> Any:
    """The shrunken config of a model type."""
    return _shrunk(CONFIG_MAPPING[name], EXCEPTIONS.get(name, {}))


def tiny_model(name: str, attention: str | None = None, seed: int = 0) -> Any:
    """A model of float32 random weights in evaluation mode; the same seed gives the same weights.

    Args:
        attention: backend, by default transformers' own choice; eager where logits are bounded,
            for transformers before 5.21 chooses sdpa, which leaves the bound out.
    """
    torch.manual_seed(seed)
    config = tiny_config(name)
    if getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        attention = attention or "eager"
    named = {} if attention is None else {"attn_implementation": attention}
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **named)
    for parameter_name, parameter in model.named_parameters():
        # What starts constant or small would not be missed when forgotten.
        constant = bool((parameter == parameter.flatten()[0]).all())
        if "sink" in parameter_name:
            torch.nn.init.normal_(parameter, std=SINKS)
        elif constant and "bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif not bool(parameter.isfinite().all()):
            torch.nn.init.normal_(parameter, std=SPREAD)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = None
        model.generation_config.forced_eos_token_id = None
        model.generation_config.forced_bos_token_id = None
        model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_prompt(length: int = 60, seed: int = 1) -> torch.Tensor:
    """Token ids, (1, length), without the first few, which may be special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, VOCABULARY, (1, length), generator=generator)


def _shrunk(config_class: Any, exceptions: dict[str, Any], default: Any = None) -> Any:
    """A config of this class in small; `default` is one as it comes."""
    config = default or _default(config_class, exceptions)
    fields = _fields(config)
    changes: dict[str, Any] = {}
    depth = _depth(fields, exceptions)
    for name, value in fields.items():
        if name in exceptions:
            continue
        if name in TOKENS:
            changes[name] = 0 if isinstance(value, (int, list)) else value
        elif name in DEPTHS and value is not None:
            changes[name] = depth
        elif name in SIZES and value and not isinstance(value, (bool, list, dict)):
            changes[name] = type(value)(SIZES[name])
        elif isinstance(value, list) and len(value) > depth and len(value) == _layers(fields):
            changes[name] = _shortened(value, depth, cycled=name in CYCLED)
    if fields.get("kv_lora_rank") and "num_key_value_heads" in fields:
        changes["num_key_value_heads"] = changes.get("num_attention_heads", 4)
    if fields.get("head_dim") and fields.get("head_dim") == fields.get("qk_rope_head_dim"):
        changes["head_dim"] = changes["qk_rope_head_dim"]
    for name in config_class.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            inner = _shrunk(type(part), exceptions.get(name, {}), part)
            changes[name] = inner.to_dict()
    given = {k: v for k, v in exceptions.items() if k not in config_class.sub_configs}
    return config_class(**{**changes, **given})


def _default(config_class: Any, exceptions: dict[str, Any]) -> Any:
    """The config as it comes, with what it cannot do without."""
    try:
        return config_class()
    except Exception:
        given = {k: v for k, v in exceptions.items() if k not in config_class.sub_configs}
        return config_class(**given)


def _fields(config: Any) -> dict[str, Any]:
    """What the config is given by: neither computed fields nor second names."""
    fields = dict(config.to_dict())
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        if getattr(config, name, None):
            fields.setdefault(name, list(getattr(config, name)))
        stored = config.attribute_map.get(name, name)
        if stored != name or isinstance(getattr(type(config), stored, None), property):
            fields.pop(name, None)
    return fields


def _layers(fields: dict[str, Any]) -> int:
    return next((fields[name] for name in DEPTHS if isinstance(fields.get(name), int)), 0)


def _depth(fields: dict[str, Any], exceptions: dict[str, Any]) -> int:
    """Layers that let every kind occur twice, and shared layers come after their owners."""
    for name in DEPTHS:
        if name in exceptions:
            return int(exceptions[name])
    kinds = max((len(set(fields.get(name) or [])) for name in CYCLED), default=1)
    return max(LAYERS, 2 * kinds, 6 if fields.get("num_kv_shared_layers") else 0)


def _shortened(values: list[Any], depth: int, cycled: bool) -> list[Any]:
    """The list's kinds in the order in which they come, `depth` long."""
    if values and not isinstance(values[0], str):
        return values[:depth]
    kinds = list(dict.fromkeys(values))
    if cycled:
        return [kinds[place % len(kinds)] for place in range(depth)]
    return (kinds + [kinds[-1]] * depth)[:depth]
