"""A GGUF file, in one part or several -> a safetensors folder in the user's cache, converted once.

A conversion is keyed by the files' hash and checked on every load. Knows nothing of the engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import torch
from filelock import FileLock

from dynamickv.models import gguf as files
from dynamickv.models.faults import UnusableModelError, unreadable

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
VERSION = 3
"""Of what a conversion reads from a file; kept ones of another version are made again.
2: parts, rotary scaling, the file's own way of splitting text, no weights made up.
3: the bits of its weights, files checked in parts."""
CHECKED_AT_ONCE = 16 * 2**20
"""Bytes of a file that one thread reads."""
END_OF_TURN = "tokenizer.ggml.eot_token_id"
CONVERTING, DAMAGED = ".converting-", ".damaged-"
"""What the folders begin with that exist only while something is converted."""
_ONE_AT_A_TIME = threading.Lock()


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
    """The safetensors folder of a GGUF file, converted now unless an intact conversion is kept.

    Args:
        gguf: the file, or any part of a model that is kept in several.

    Raises:
        ValueError: in one sentence, a file that is damaged, incomplete or not understood.
    """
    parts = files.parts_of(gguf)
    folder = cache_folder() / "models" / f"{parts[0].stem}-{file_hash(*parts)[:16]}"
    with _ONE_AT_A_TIME:
        if folder.exists() and conversion_fault(folder) is None and _version(folder) == VERSION:
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The system gives the lock back when its process ends, however it ends.
        with FileLock(cache_folder() / "converting.lock"):
            _remove_leftovers(folder.parent)
            _convert_unless_done(gguf, folder)
    return folder


def _convert_unless_done(gguf: Path, folder: Path) -> None:
    if not folder.exists():
        log.info("Converting %s once; later starts take less than a second.", gguf.name)
    elif (fault := conversion_fault(folder)) is not None:
        log.warning(
            "The converted model in the cache is damaged (%s); it is rebuilt from %s.",
            fault,
            gguf.name,
        )
        _remove(folder)
    elif _version(folder) != VERSION:
        log.info("Converting %s again: more of the file is read now.", gguf.name)
        _remove(folder)
    else:
        return  # by another process, while this one waited
    _convert(gguf, folder)


def _bits_per_weight(source: files.Gguf) -> float:
    """Over all matrices, the scales of quantized blocks included."""
    matrices = [tensor for tensor in source.tensors.values() if len(tensor.shape) > 1]
    count = sum(math.prod(tensor.shape) for tensor in matrices)
    return 8 * sum(tensor.nbytes for tensor in matrices) / max(count, 1)


def bits_of(folder: Path) -> float:
    """Bits per weight of the file that an intact conversion was made from."""
    return float(_manifest(folder)["bits"])


def _version(folder: Path) -> int:
    return int(_manifest(folder).get("version", 1))


def _manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / MANIFEST).read_text("utf-8"))
    return read


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left. Whoever converts holds the lock, so these are nobody's."""
    for prefix in (CONVERTING, DAMAGED):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def conversion_fault(folder: Path) -> str | None:
    """What is wrong with a kept conversion, or None when every file is as it was written. One of
    another version is made again without being looked at: its files were checked otherwise."""
    try:
        manifest = _manifest(folder)
        expected = {
            str(name): (int(size), int(crc)) for name, (size, crc) in manifest["files"].items()
        }
        if int(manifest.get("version", 1)) != VERSION:
            return None
        if not 0 < float(manifest["bits"]) < math.inf:
            return f"{MANIFEST} cannot be read"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    if not any(name.endswith(".safetensors") for name in expected):
        return "no weights were written"
    for name, size_and_crc in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (path.stat().st_size, file_crc(path)) != size_and_crc:
            return f"{name} has changed"
    return None


def file_hash(*paths: Path) -> str:
    """BLAKE2b of the files' content, one after the other, hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    for path in paths:
        for block in _blocks(path):
            digest.update(block)
    return digest.hexdigest()


def source_of(folder: Path) -> str:
    """The first 16 digits of the hash of what a conversion was made from: reading a large file for
    its hash takes seconds."""
    return folder.name[-16:]


def file_crc(path: Path) -> int:
    """CRC-32 of the CRC-32s of a file's parts: guards against damage, at a fraction of a hash's
    time."""
    starts = range(0, path.stat().st_size, CHECKED_AT_ONCE)

    def part(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(CHECKED_AT_ONCE)).to_bytes(4, "big")

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        return zlib.crc32(b"".join(threads.map(part, starts)))


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(4 * 2**20):
            yield block


def _remove(folder: Path) -> None:
    """Take a conversion out of the way in one step, so that no half-removed one is ever found."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=DAMAGED))
    try:
        folder.rename(aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the conversion beside its place and rename it there, so that no half-written one is
    ever found."""
    import transformers

    from dynamickv.models.gguf_tokenizer import load_tokenizer

    source = files.read(gguf)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=CONVERTING))
    try:
        with _readable(gguf.name):
            tokenizer = load_tokenizer(source)
            model = _read_model(source, temporary)
            # Of several processes transformers lets the first alone write; any may convert here.
            model.should_save_on_this_rank = lambda _: True
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        written = {
            path.name: (path.stat().st_size, file_crc(path)) for path in sorted(temporary.iterdir())
        }
        manifest = {
            "version": VERSION,
            "source": gguf.name,
            "transformers": transformers.__version__,
            "bits": _bits_per_weight(source),
            "files": written,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_model(source: files.Gguf, folder: Path) -> Any:
    """The model in float32; joined files are written to `folder` for transformers, and removed."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    from dynamickv.models import gguf_weights as weights
    from dynamickv.models.gguf_config import complete

    joined = folder / "joined.gguf"
    files.write_joined(source, joined, weights=False)
    config = AutoConfig.from_pretrained(folder, gguf_file=joined.name)
    complete(config, source)
    empty = weights.empty_model(config)
    places = weights.places_of_weights(empty, source)
    expected: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
    }
    if places is not None and source.architecture in weights.READ_HERE:
        read = type(empty).from_pretrained(
            None, state_dict=weights.read_weights(config, source, places), **expected
        )
    else:
        files.write_joined(source, joined)
        read = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=joined.name,
            quantization_config=GgufConfig(dequantize=True),
            **expected,
        )
    model, info = read
    joined.unlink()
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[fault]:
            raise UnusableModelError(
                f"{source.name} does not fit transformers' {type(model).__name__} "
                f"({fault.replace('_', ' ')}: {sorted(map(str, info[fault]))[0]}); "
                "load the model's folder with safetensors instead"
            )
    stops = model.generation_config.eos_token_id
    stops = {*(stops if isinstance(stops, list) else [stops]), source.metadata.get(END_OF_TURN)}
    model.generation_config.eos_token_id = sorted(stops - {None}) or None
    return model


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """One sentence for whatever the GGUF readers raise; they raise many kinds, which all mean the
    same to the user."""
    try:
        with quiet():
            yield
    except UnusableModelError:
        raise
    except Exception as error:
        raise ValueError(unreadable(name, error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own progress bars out of the way while loading."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]
