"""DynamicKV and its rivals on transformers: see, compare and use KV-cache compression.

llm = load_model("smollm2-135m")
trace = compare(llm, document, question, methods=[FullKV(), DynamicKV(capacity=128)])
"""

import dynamickv.threads  # noqa: F401  # isort: skip  (before torch)
from typing import TYPE_CHECKING, Any

from dynamickv.memory import OutOfMemory, free_memory, release_memory
from dynamickv.methods import (
    CAKE,
    H2O,
    METHODS,
    Capabilities,
    CompressionMethod,
    DynamicKV,
    FullKV,
    KeyDiff,
    LAVa,
    Manual,
    PyramidKV,
    ScoredMethod,
    ShiftKV,
    SnapKV,
    StreamingLLM,
    VoteKV,
    build_method,
    build_methods,
)
from dynamickv.methods.decoding import Decoding
from dynamickv.methods.registry import capabilities
from dynamickv.methods.retain import retain
from dynamickv.neighbours import give_back_threads
from dynamickv.record import trace
from dynamickv.record.events import (
    ComparisonFinished,
    Compressed,
    Event,
    LayerKept,
    Progress,
    PromptEncoded,
    RunFinished,
    Token,
)
from dynamickv.record.expected import find_expected
from dynamickv.record.trace import (
    Agreement,
    Aligned,
    Divergence,
    Expected,
    Forgotten,
    ModelInfo,
    Prompt,
    Retained,
    Run,
    Scores,
    Trace,
)
from dynamickv.records import LayerObservation, Prefill, Retention
from dynamickv.version import TRANSFORMERS_NEEDED, __version__, transformers_serves

if TYPE_CHECKING or transformers_serves():
    from dynamickv import evaluate
    from dynamickv.answer import Preview, preview
    from dynamickv.compare import compare, compare_stream
    from dynamickv.conversation import Conversation
    from dynamickv.decoding.asking import with_question
    from dynamickv.decoding.forcing import divergence, forced_logits
    from dynamickv.decoding.reads import Reads, reads
    from dynamickv.models import Geometry, LoadedModel, load_model
    from dynamickv.models.catalogue import DEFAULT_MODEL, KNOWN_MODELS, KnownModel
    from dynamickv.reading.prefill import prefill, prefill_text
    from dynamickv.reading.prompt import require_longer_document
    from dynamickv.reading.store import PrefillStore
    from dynamickv.serve import CompressedCache, compress
    from dynamickv.smallest import (
        Probe,
        Smallest,
        capacities,
        search_capacity,
        smallest_capacity,
    )
else:

    def __getattr__(name: str) -> Any:
        """Methods, `retain` and records work beside an older transformers (kvpress pins one)."""
        if name in __all__:
            raise ImportError(f"dynamickv.{name} {TRANSFORMERS_NEEDED}")
        raise AttributeError(f"module 'dynamickv' has no attribute {name!r}")


__all__ = [
    "CAKE",
    "DEFAULT_MODEL",
    "H2O",
    "KNOWN_MODELS",
    "METHODS",
    "Agreement",
    "Aligned",
    "Capabilities",
    "ComparisonFinished",
    "Compressed",
    "CompressedCache",
    "CompressionMethod",
    "Conversation",
    "Decoding",
    "Divergence",
    "DynamicKV",
    "Event",
    "Expected",
    "Forgotten",
    "FullKV",
    "Geometry",
    "KeyDiff",
    "KnownModel",
    "LAVa",
    "LayerKept",
    "LayerObservation",
    "LoadedModel",
    "Manual",
    "ModelInfo",
    "OutOfMemory",
    "Prefill",
    "PrefillStore",
    "Preview",
    "Probe",
    "Progress",
    "Prompt",
    "PromptEncoded",
    "PyramidKV",
    "Reads",
    "Retained",
    "Retention",
    "Run",
    "RunFinished",
    "ScoredMethod",
    "Scores",
    "ShiftKV",
    "Smallest",
    "SnapKV",
    "StreamingLLM",
    "Token",
    "Trace",
    "VoteKV",
    "__version__",
    "build_method",
    "build_methods",
    "capabilities",
    "capacities",
    "compare",
    "compare_stream",
    "compress",
    "divergence",
    "evaluate",
    "find_expected",
    "forced_logits",
    "free_memory",
    "give_back_threads",
    "load_model",
    "prefill",
    "prefill_text",
    "preview",
    "reads",
    "release_memory",
    "require_longer_document",
    "retain",
    "search_capacity",
    "smallest_capacity",
    "trace",
    "with_question",
]
