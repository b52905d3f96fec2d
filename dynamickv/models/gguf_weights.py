"""The weights of a GGUF file -> a transformers model.

transformers fills weights that it does not find with fresh random numbers, so what a file lacks is
refused here. Most architectures' weights are read here too: transformers unpacks them in pieces of
sixteen rows and lists all names that gguf knows anew for every module of the model, which is three
quarters of a conversion's time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    dequantize,
    get_tensor_name_map,
)
from numpy.typing import NDArray
from torch import Tensor

from dynamickv.models import gguf as files
from dynamickv.models.faults import UnusableModelError
from dynamickv.models.gguf import Gguf
from dynamickv.models.gguf_config import LLAMA3_FREQUENCIES, LONGROPE

NOT_WEIGHTS = (LLAMA3_FREQUENCIES, *LONGROPE)
UNPACKED_AT_ONCE = 2**17
"""Numbers, a multiple of every block: as many as stay in a CPU's cache."""

Numbers = NDArray[np.float32]


def empty_model(config: Any) -> Any:
    """The model of a config, without storage."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]


def places_of_weights(empty: Any, model: Gguf) -> dict[str, str] | None:
    """Name in the model -> name in the file, of all its weights but those that are tied; None where
    gguf does not know the names of some.

    Raises:
        ValueError: the file lacks a weight that the model needs, has it in another size, or holds
            one that the model has no place for.
    """
    architectures = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if model.architecture not in architectures:
        return None  # and transformers' own check is all there is
    config = empty.config
    names = get_tensor_name_map(architectures[model.architecture], config.num_hidden_layers)
    tied: set[str] = set()
    if config.tie_word_embeddings:
        tied = set(getattr(empty, "_tied_weights_keys", None) or ())
    known = set(NOT_WEIGHTS)
    places: dict[str, str] = {}
    complete_map = True
    for ours, weight in empty.state_dict().items():
        stem, dot, ending = ours.rpartition(".")
        theirs = names.get_name(stem) if ending in ("weight", "bias") else names.get_name(ours)
        if theirs is None:
            complete_map = complete_map and ours in tied
            continue
        name = f"{theirs}{dot}{ending}" if ending in ("weight", "bias") else theirs
        known.add(name)
        held = model.tensors.get(name)
        if held is None:
            if ours in tied:
                continue
            raise UnusableModelError(
                f"{model.name} lacks the tensor {name}, which a {model.architecture} model needs; "
                "download it again, or convert the model anew"
            )
        if math.prod(held.shape) != weight.numel():
            raise UnusableModelError(
                f"{model.name} says that {name} has {tuple(weight.shape)} numbers and holds "
                f"{held.shape}; its settings and its weights do not belong together, so convert "
                "the model anew"
            )
        places[ours] = name
    left = [name for name in model.tensors if name not in known]
    if complete_map and left:
        raise UnusableModelError(
            f"{model.name} holds the tensor {left[0]}, for which transformers' model has no place; "
            "load the model's folder with safetensors instead"
        )
    return places if complete_map else None


def read_weights(config: Any, model: Gguf, places: dict[str, str]) -> dict[str, Tensor]:
    """A model's weights in float32, by their names in the model.

    Args:
        config: of an architecture in `READ_HERE`.
        places: as `places_of_weights` says.
    """
    as_transformers = READ_HERE[model.architecture]

    def read(theirs: str) -> Tensor:
        return torch.from_numpy(as_transformers(theirs, unpacked(model.tensors[theirs]), config))

    # numpy lets other threads work while it unpacks.
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return dict(zip(places, threads.map(read, places.values()), strict=True))


def unpacked(tensor: files.Tensor) -> Numbers:
    """A tensor's numbers in its own shape, bit for bit as gguf unpacks its blocks."""
    kind = GGMLQuantizationType(tensor.kind)
    in_block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.fromfile(tensor.part, np.uint8, tensor.nbytes, offset=tensor.start)
    numbers = np.empty(math.prod(tensor.shape), np.float32)
    at_once = UNPACKED_AT_ONCE // in_block
    for first in range(0, tensor.nbytes // block_bytes, at_once):
        piece = blocks[first * block_bytes : (first + at_once) * block_bytes]
        # As one row: gguf works through sixteen rows at a time, however short they are.
        numbers[first * in_block : (first + at_once) * in_block] = dequantize(piece[None], kind)[0]
    return numbers.reshape(tensor.shape)


def _as_it_is(name: str, weights: Numbers, config: Any) -> Numbers:
    return weights


def _rotated_by_halves(name: str, weights: Numbers, config: Any) -> Numbers:
    """llama.cpp rotates neighbouring numbers of a head, transformers those half a head apart."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = name.split(".")[-2]
    if part not in heads:
        return weights
    pairs = weights.reshape(heads[part], -1, 2, *weights.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)


def _norms_around_zero(name: str, weights: Numbers, config: Any) -> Numbers:
    """Files hold 1 + w of Gemma's norms."""
    return weights - 1 if name.endswith("norm.weight") else weights


READ_HERE: dict[str, Callable[[str, Numbers, Any], Numbers]] = {
    "llama": _rotated_by_halves,
    "qwen2": _as_it_is,
    "qwen3": _as_it_is,
    "gemma2": _norms_around_zero,
    "gemma3": _norms_around_zero,
}
"""Architecture -> a tensor of the file as transformers' model has it. Others are read by
transformers, which knows what else to do with theirs."""
