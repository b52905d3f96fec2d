"""What `load_model` was asked for, or "auto" -> what torch and transformers take."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from dynamickv.models.faults import first_line
from dynamickv.models.loaded import QUANTIZATIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """The torch device; "auto" takes cuda, then mps, then cpu.

    Raises:
        ValueError: if it cannot be used.
    """
    if device != "auto":
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError, NotImplementedError):
            raise ValueError(
                f"there is no device {device!r}; choose auto, cpu, cuda or mps"
            ) from None
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format; "auto" is float32 on the CPU, bfloat16 elsewhere.

    Raises:
        ValueError: if it is none of DTYPES.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def choose_attention(config: Any) -> str:
    """The backend for a model: sdpa computes neither bounded logits nor learned sinks."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    bounded = getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None)
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    able = getattr(kind, "_supports_sdpa", True)
    return "eager" if bounded is not None or not able else "sdpa"


def choose_quantization(quantization: str | None, dtype: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig, or None.

    Raises:
        ValueError: if it is none of QUANTIZATIONS, or bitsandbytes cannot be used.
    """
    if quantization is None:
        return None
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"quantization must be {', '.join(QUANTIZATIONS)} or None, got {quantization!r}"
        )
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # a build that does not fit torch or the card raises many kinds
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        fault = "is not installed" if missing else f"cannot be used ({first_line(error)})"
        raise ValueError(
            f"{quantization} weights need bitsandbytes, which {fault}; "
            "pip install bitsandbytes, or load without quantization"
        ) from error
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
