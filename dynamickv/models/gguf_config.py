"""What a GGUF file says of its model -> transformers' config, where transformers leaves it out.

transformers drops rotary scaling, windows and head sizes without a word. Here each is read, or
refused in one sentence.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamickv.models.faults import UnusableModelError
from dynamickv.models.gguf import Gguf

LLAMA3_FREQUENCIES = "rope_freqs.weight"
LONGROPE = ("rope_factors_short.weight", "rope_factors_long.weight")
SETTINGS = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
}
"""Key of the file -> attribute of the config, where both exist."""
MUST_BE_NEUTRAL = {
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
}
"""What transformers' models of these architectures cannot do: key -> the value that changes
nothing."""
SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
"""(architecture, layers) whose attention is scaled by the width per head (the 27B ones), which
llama.cpp recognises likewise, because files do not say."""
OWN_LAYOUT = ("gemma4",)
"""Architectures whose layers differ in size, which transformers reads in its own way."""


def complete(config: Any, model: Gguf) -> None:
    """Put into `config` what the file says and transformers did not read.

    Raises:
        ValueError: a setting that transformers' model cannot follow, named.
    """
    for key, neutral in MUST_BE_NEUTRAL.items():
        value = model.get(key, neutral)
        if isinstance(value, int | float) and value not in (0, neutral):
            raise UnusableModelError(
                f"{model.name} sets {model.architecture}.{key} to {value:g}, which transformers' "
                "model does not follow; load the model's folder with safetensors instead"
            )
    experts = model.get("expert_count", 0)
    if experts and not (hasattr(config, "num_experts") or hasattr(config, "num_local_experts")):
        raise UnusableModelError(
            f"{model.name} is a {model.architecture} model with {experts} experts, which "
            "transformers' model does not have; load the model's folder with safetensors instead"
        )
    if model.architecture not in OWN_LAYOUT:
        for key, attribute in SETTINGS.items():
            value = model.get(key)
            if isinstance(value, int | float) and hasattr(config, attribute):
                setattr(config, attribute, value)
        window = model.get("attention.sliding_window")
        if isinstance(window, int) and 0 < window < config.max_position_embeddings:
            _set_if_there(config, "sliding_window", window)
    if (model.architecture, config.num_hidden_layers) in SCALED_BY_WIDTH:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    _set_if_there(config, "attention_bias", "blk.0.attn_q.bias" in model.tensors)
    _complete_rope(config, model)


def _set_if_there(config: Any, attribute: str, value: Any) -> None:
    if hasattr(config, attribute):
        setattr(config, attribute, value)


def _complete_rope(config: Any, model: Gguf) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return
    # Where layers differ, scaling is that of the layers which see everything.
    nested = rope.get("full_attention")
    own = nested if isinstance(nested, dict) else rope
    if (theta := model.get("rope.freq_base")) is not None:
        own["rope_theta"] = theta
    if nested and (theta := model.get("rope.freq_base_swa")) is not None:
        rope["sliding_attention"]["rope_theta"] = theta
    if model.architecture not in OWN_LAYOUT:
        _set_rotated_part(config, own, model)
    scaling = _scaling(model, own["rope_theta"])
    if scaling:
        own.update(scaling)
        # Phi-3's own attribute comes before the dictionary's.
        original = scaling.get("original_max_position_embeddings")
        if original:
            _set_if_there(config, "original_max_position_embeddings", original)


def _set_rotated_part(config: Any, rope: dict[str, Any], model: Gguf) -> None:
    size = config.hidden_size // config.num_attention_heads
    head_dim = model.get("attention.key_length", size)
    rotated = model.get("rope.dimension_count", head_dim)
    if "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise UnusableModelError(
            f"{model.name} rotates {rotated} of {head_dim} numbers of a head "
            f"({model.architecture}.rope.dimension_count), which transformers' model does not "
            "follow; load the model's folder with safetensors instead"
        )


def _scaling(model: Gguf, theta: float) -> dict[str, Any] | None:
    """Rotary scaling as transformers' `rope_parameters` has it, or None."""
    kind = model.get("rope.scaling.type")
    factor = model.get("rope.scaling.factor") or model.get("rope.scale_linear") or 1.0
    if kind is None:
        kind = "linear" if factor != 1.0 else "none"  # as llama.cpp reads it
    original = model.get("rope.scaling.original_context_length") or model.get("context_length")
    if all(name in model.tensors for name in LONGROPE):
        short, long = (model.numbers(name).tolist() for name in LONGROPE)
        longrope = {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": original,
            "factor": model.get("context_length") / original,
        }
        attention = model.get("rope.scaling.attn_factor")
        return longrope if attention is None else {**longrope, "attention_factor": attention}
    if LLAMA3_FREQUENCIES in model.tensors:
        if kind != "none":
            raise UnusableModelError(
                f"{model.name} has {LLAMA3_FREQUENCIES} and rope.scaling.type {kind!r} as well, "
                "which transformers cannot join; load the model's folder with safetensors instead"
            )
        return _llama3(model, theta)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return _yarn(model, factor, original)
    raise UnusableModelError(
        f"{model.name} scales its rotary positions in the way {kind!r} (rope.scaling.type), which "
        "is not known here; load the model's folder with safetensors instead"
    )


def _yarn(model: Gguf, factor: float, original: int) -> dict[str, Any]:
    yarn = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for end in ("fast", "slow"):
        if (value := model.get(f"rope.scaling.yarn_beta_{end}")) is not None:
            yarn[f"beta_{end}"] = value
    if (attention := model.get("rope.scaling.attn_factor", 1.0)) != 1.0:
        # llama.cpp multiplies what transformers would use by it.
        yarn["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return yarn


def _llama3(model: Gguf, theta: float) -> dict[str, Any] | None:
    """The settings whose frequencies the file holds; it holds nothing else of them."""
    wanted = model.numbers(LLAMA3_FREQUENCIES)
    if np.allclose(wanted, 1.0):
        return None
    lengths = [8192, *(2**power for power in range(4, 21) if power != 13)]
    for original in lengths:
        for factor in (float(wanted.max()), 8.0, 32.0):
            if np.allclose(_llama3_divisors(len(wanted), theta, factor, original), wanted, 1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": original,
                }
    raise UnusableModelError(
        f"{model.name} divides its rotary frequencies ({LLAMA3_FREQUENCIES}) otherwise than "
        "Llama 3 does; load the model's folder with safetensors instead"
    )


def _llama3_divisors(count: int, theta: float, factor: float, original: int) -> NDArray[np.float64]:
    """What Llama 3.1 divides its frequencies by, for low and high factors of 1 and 4."""
    turns = original / (2 * math.pi * theta ** (np.arange(count) / count))
    smooth = np.clip((turns - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))
