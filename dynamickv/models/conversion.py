"""A GGUF file -> a safetensors folder in the user's cache, converted once.

A conversion is keyed by the file's hash and checked on every load. Knows nothing of the engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import torch
from filelock import FileLock

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
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
    """The safetensors folder of a GGUF file, converted now unless an intact conversion is kept."""
    folder = cache_folder() / "models" / f"{gguf.stem}-{file_hash(gguf)[:16]}"
    with _ONE_AT_A_TIME:
        if folder.exists() and conversion_fault(folder) is None:
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
    elif (fault := conversion_fault(folder)) is None:
        return  # by another process, while this one waited
    else:
        log.warning(
            "The converted model in the cache is damaged (%s); it is rebuilt from %s.",
            fault,
            gguf.name,
        )
        _remove(folder)
    _convert(gguf, folder)


def _remove_leftovers(folder: Path) -> None:
    """What a killed process left. Whoever converts holds the lock, so these are nobody's."""
    for prefix in (CONVERTING, DAMAGED):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=CONVERTING))
    try:
        try:
            with quiet():
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
            raise ValueError(unreadable(gguf.name, error)) from error
        files = {
            path.name: (path.stat().st_size, file_crc(path)) for path in sorted(temporary.iterdir())
        }
        manifest = {"source": gguf.name, "transformers": transformers.__version__, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unreadable(name: str, error: Exception) -> str:
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
    return (
        f"{name} cannot be read as a language model ({first_line(error)}); "
        "check that its files are complete"
    )


def first_line(error: Exception) -> str:
    """What another library's error says, short enough for a sentence."""
    lines = (line.strip() for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__).rstrip(".")[:200]


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
