"""Prune while prefilling: a cache for any transformers model's own `generate`."""

from dynamickv.serve.block import compress
from dynamickv.serve.cache import CompressedCache

__all__ = ["CompressedCache", "compress"]
