"""What to keep: the methods, each in a file of its own, and their registry."""

from dynamickv.methods.base import CompressionMethod, ScoredMethod
from dynamickv.methods.cake import CAKE
from dynamickv.methods.capabilities import Capabilities
from dynamickv.methods.dynamickv import DynamicKV
from dynamickv.methods.full import FullKV
from dynamickv.methods.h2o import H2O
from dynamickv.methods.keydiff import KeyDiff
from dynamickv.methods.lava import LAVa
from dynamickv.methods.manual import Manual
from dynamickv.methods.pyramidkv import PyramidKV
from dynamickv.methods.registry import METHODS, build_method, build_methods
from dynamickv.methods.shiftkv import ShiftKV
from dynamickv.methods.snapkv import SnapKV
from dynamickv.methods.streaming_llm import StreamingLLM
from dynamickv.methods.votekv import VoteKV

__all__ = [
    "CAKE",
    "H2O",
    "METHODS",
    "Capabilities",
    "CompressionMethod",
    "DynamicKV",
    "FullKV",
    "KeyDiff",
    "LAVa",
    "Manual",
    "PyramidKV",
    "ScoredMethod",
    "ShiftKV",
    "SnapKV",
    "StreamingLLM",
    "VoteKV",
    "build_method",
    "build_methods",
]
