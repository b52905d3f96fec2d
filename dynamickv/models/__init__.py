"""A name becomes a model: short name, hub id, folder or .gguf file -> LoadedModel."""

from dynamickv.models.catalogue import DEFAULT_MODEL, KNOWN_MODELS, KnownModel
from dynamickv.models.conversion import (
    MANIFEST,
    cache_folder,
    conversion_fault,
    converted,
    file_hash,
    kept_conversions,
)
from dynamickv.models.geometry import Geometry, require_compressible
from dynamickv.models.loaded import QUANTIZATIONS, LoadedModel
from dynamickv.models.loading import load_model
from dynamickv.models.sources import embedded_file

__all__ = [
    "DEFAULT_MODEL",
    "KNOWN_MODELS",
    "MANIFEST",
    "QUANTIZATIONS",
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
