"""name | hub id | folder | .gguf file -> LoadedModel: a model, its tokenizer and its geometry.

Loads safetensors and GGUF only: no pickle, no remote code.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from dynamickv.models.catalogue import DEFAULT_MODEL
from dynamickv.models.choices import (
    choose_attention,
    choose_device,
    choose_dtype,
    choose_quantization,
)
from dynamickv.models.conversion import bits_of, converted, quiet, source_of
from dynamickv.models.faults import UnusableModelError, first_line, unreadable
from dynamickv.models.geometry import require_compressible
from dynamickv.models.loaded import LoadedModel
from dynamickv.models.precision import packed_for, require_precision
from dynamickv.models.sources import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)
ADAPTER = "adapter_config.json"


def load_model(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    precision: str = "auto",
) -> LoadedModel:
    """Load a model by short name, hub id, folder or .gguf file.

    Args:
        name: "smollm2-135m" (the embedded default), "organisation/model" on the hub, a folder with
            safetensors, or a file. device: "auto" (cuda, then mps, then cpu) or a torch device.
            dtype: "auto" (float32 on cpu, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
            attention: "auto" ("sdpa", or "eager" where that cannot compute a model's attention) or
            a transformers attention backend such as "sdpa" or "eager".
        device_map: instead of `device`, spread the layers over several devices and the disk:
            "auto" or {module: device}, as transformers takes it. Each layer's cache lies where its
            layer works.
        quantization: "4bit" (NF4) or "8bit" packs the weights of the linear layers with
            bitsandbytes while they are read; `dtype` is what is computed and cached. None takes the
            checkpoint as it is, packed or not. A 4bit model on the CPU must not be saved:
            bitsandbytes 0.50 writes its weights wrongly once they were used.
        revision: commit, branch or tag of a model on the hub. Short names are pinned to theirs.
        precision: "exact" computes in `dtype`, bit for bit as the plain model. "fast" lets a
            prompt's products round as bfloat16 ones do, with float32 sums, on a CPU that has
            instructions for them (avx512_bf16, AMX), decodes from the codes of a GGUF file's
            weights, and is exact elsewhere. "auto" is "fast" for a GGUF file of less
            than 16 bits per weight, whose weights are rounded anyway, else "exact".

    Raises:
        ValueError: an unknown name or option, or a model that cannot be read, in one sentence.
        FileNotFoundError: a file or folder that does not exist.
    """
    name = os.fspath(name)
    require_precision(precision)
    if device_map is not None and device != "auto":
        raise ValueError(f"give device ({device!r}) or device_map, not both")
    place = choose_device(device)
    number_format = choose_dtype(dtype, place)
    packing = choose_quantization(quantization, number_format)
    source, pinned, gguf = resolve(name, revision)
    origin, bits = None, None
    if gguf is not None:
        source = converted(gguf)
        origin, bits = f"gguf-{source_of(source)[:12]}", bits_of(source)
    with _explained(name):
        _require_no_adapter(source, pinned, name)
        config = _read_config(source, pinned)
    if not getattr(config, "is_encoder_decoder", False):
        _require_language_model(config, name)
    require_compressible(config)
    with _explained(name):
        _require_tokenizer(source, pinned, name)
    backend = choose_attention(config) if attention == "auto" else attention
    packed = getattr(config, "quantization_config", None) is not None
    if packed and packing is not None:
        raise ValueError(f"{name} is quantized already; load it without quantization")
    # Packed weights cannot change their place or format later.
    to_place = device_map is None and not packed and packing is None
    layers = device_map if device_map is not None or to_place else {"": place}
    with _explained(name):
        _require_tokenizer(source, pinned, name)
        tokenizer = _read_tokenizer(source, config, pinned, converted=gguf is not None)
        model = _read_weights(source, config, number_format, backend, layers, packing, pinned)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{name} has no fast tokenizer, which exact text positions need; "
            "choose a model with tokenizer.json"
        )
    origin = origin or getattr(model.config, "_commit_hash", None) or pinned or "local"
    if to_place:
        model.to(place)  # type: ignore[arg-type]
    fast = packed_for(precision, model, bits)
    llm = LoadedModel.wrap(model, tokenizer, name, origin, fast)
    if llm.quantization is not None:
        _require_packed_products(llm)
    return llm


def _require_no_adapter(source: Path | str, revision: str | None, name: str) -> None:
    # transformers leaves an adapter beside a model out, without a word, where peft is missing.
    if adapter := _file(source, revision, ADAPTER):
        base = json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path") or "its model"
        raise UnusableModelError(
            f"{name} is an adapter for {base} ({ADAPTER}); merge the two first, with peft's "
            "merge_and_unload and save_pretrained, and load the folder that gives"
        )


def _require_tokenizer(source: Path | str, revision: str | None, name: str) -> None:
    # transformers makes an empty one up for many models.
    if not any(_file(source, revision, each) for each in TOKENIZER_FILES):
        raise UnusableModelError(
            f"{name} cannot be read as a language model: it holds no tokenizer (tokenizer.json or "
            "tokenizer.model); put those of the model that it was made from beside its weights"
        )


def _file(source: Path | str, revision: str | None, name: str) -> Path | None:
    """A file of a folder, or of a model on the hub; None if there is none or it is out of reach."""
    if isinstance(source, Path):
        return source / name if (source / name).is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def _require_language_model(config: Any, name: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = (getattr(config, "architectures", None) or [config.model_type])[0]
        seeing = " reads images or sound as well as text" if _has_more_inputs(config) else ""
        raise UnusableModelError(
            f"{name} is a {kind}, which{seeing or ' is no causal language model'}; "
            "choose a model that only reads and writes text"
        )


def _has_more_inputs(config: Any) -> bool:
    return any(getattr(config, f"{kind}_config", None) for kind in ("vision", "audio"))


def _read_config(source: Path | str, revision: str | None) -> Any:
    # transformers is imported where it is used: that takes seconds.
    from transformers import AutoConfig, PretrainedConfig

    pin = {} if revision is None else {"revision": revision}
    raw, _ = PretrainedConfig.get_config_dict(source, **pin)
    if raw.get("model_type") == "internlm2":
        import dynamickv.models.internlm2  # noqa: F401  (makes transformers know it)
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **pin)


def _read_tokenizer(
    source: Path | str, config: Any, revision: str | None, *, converted: bool
) -> PreTrainedTokenizerBase:
    if converted:
        # AutoTokenizer would put the rules of the model's family in the place of the file's own.
        from transformers import PreTrainedTokenizerFast

        own: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(source)
        return own
    if config.model_type == "internlm2":
        from dynamickv.models.internlm2 import load_tokenizer

        return load_tokenizer(source, revision)
    from transformers import AutoTokenizer

    pin = {} if revision is None else {"revision": revision}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        source, trust_remote_code=False, **pin
    )
    return tokenizer


def _read_weights(
    source: Path | str,
    config: Any,
    dtype: torch.dtype,
    attention: str,
    device_map: str | dict[str, Any] | None,
    packing: Any,
    revision: str | None,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    spread: dict[str, Any] = {}
    if device_map is not None:
        spread = {"device_map": device_map, "offload_folder": tempfile.mkdtemp(prefix="dynamickv-")}
    if packing is not None:
        spread["quantization_config"] = packing
    if revision is not None:
        spread["revision"] = revision
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **spread,
        )
        model: PreTrainedModel = loaded[0]
        missing = sorted(loaded[1]["missing_keys"])
        if missing:
            raise ValueError(f"the weights {missing[0]} are missing")
    except BaseException:
        shutil.rmtree(spread.get("offload_folder", ""), ignore_errors=True)
        raise
    if "offload_folder" in spread:
        weakref.finalize(model, shutil.rmtree, spread["offload_folder"], ignore_errors=True)
    return model


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what can go wrong while reading a checkpoint into one sentence."""
    try:
        with quiet():
            yield
    except UnusableModelError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(unreadable(name, error)) from error


@torch.no_grad()
def _require_packed_products(llm: LoadedModel) -> None:
    """Find out at once that a device has no kernel for packed weights, or none for their sizes."""
    try:
        llm.model(torch.zeros(1, 2, dtype=torch.long, device=llm.device), use_cache=False)
    except Exception as error:  # the kernels raise what they like, assertions included
        raise ValueError(
            f"{llm.device} cannot compute with the {llm.quantization} weights of {llm.name} "
            f"({first_line(error)}); choose another quantization or load without"
        ) from error
