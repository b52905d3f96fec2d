"""A GGUF file, in one part or several -> its metadata and where its tensors lie.

Reads headers itself, since the gguf package's reader takes half a minute for a large vocabulary.
Everything is checked against the files' sizes before a weight is read. Knows no model.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from dynamickv.models.faults import UnusableModelError

VERSIONS = (2, 3)
ALIGNMENT = 32
NUMBERS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
"""Value types of fixed size, as struct spells them."""
UINT32, STRING, ARRAY = 4, 8, 9
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
VOCABULARY = tuple(
    f"tokenizer.ggml.{name}" for name in ("tokens", "merges", "scores", "token_type")
)
"""Arrays of one entry per token or merge."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Where a tensor lies; its shape is in torch's order."""

    name: str
    shape: tuple[int, ...]
    kind: int
    part: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Gguf:
    """All parts of a model: the first one's metadata, everybody's tensors."""

    parts: tuple[Path, ...]
    metadata: dict[str, Any]
    spans: dict[str, tuple[int, int]]
    """Bytes of each metadata entry in the first part, key included."""
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Of the first part."""
        return self.parts[0].name

    @property
    def architecture(self) -> str:
        """Such as "llama"."""
        return str(self.metadata["general.architecture"])

    def get(self, key: str, default: Any = None) -> Any:
        """A value of this architecture, such as `rope.freq_base`."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A small tensor of plain numbers, flat.

        Raises:
            ValueError: if it is stored in quantized blocks.
        """
        tensor = self.tensors[name]
        kinds = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        if tensor.kind not in kinds:
            raise UnusableModelError(
                f"{self.name} has quantized numbers in {name}; choose a file that has it in float32"
            )
        kind = kinds[GGMLQuantizationType(tensor.kind)]
        with tensor.part.open("rb") as file:
            file.seek(tensor.start)
            return np.frombuffer(file.read(tensor.nbytes), dtype=kind).astype(np.float64)


def read(path: Path) -> Gguf:
    """The model that a file, or any one of its parts, belongs to.

    Raises:
        ValueError: a file that is no GGUF, cut off, or one of several parts that are not all here.
    """
    parts = parts_of(path)
    headers = [_read_part(part) for part in parts]
    metadata, spans, _ = headers[0]
    count = int(metadata.get("split.count", 1))
    if count > len(parts):
        number = int(metadata.get("split.no", 0)) + 1
        raise UnusableModelError(
            f"{path.name} is part {number} of {count}, but its name does not say so; name the "
            f"parts model-00001-of-{count:05d}.gguf and so on, in one folder"
        )
    tensors = {tensor.name: tensor for *_, held in headers for tensor in held}
    promised = int(metadata.get("split.tensors.count", len(tensors)))
    if len(tensors) != promised:
        raise UnusableModelError(
            f"the parts of {path.name} hold {len(tensors)} tensors of {promised}; "
            "download them again"
        )
    if "general.architecture" not in metadata:
        raise UnusableModelError(_broken(path, "it names no architecture"))
    return Gguf(parts, metadata, spans, tensors)


def parts_of(path: Path) -> tuple[Path, ...]:
    """Every part of a model that is kept in several files, in order; else the file alone.

    Raises:
        ValueError: naming the first part that is missing.
    """
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    parts = tuple(
        path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}{path.suffix}")
        for number in range(1, count + 1)
    )
    for part in parts:
        if not part.is_file():
            raise UnusableModelError(
                f"{path.name} is one of {count} parts and {part.name} is missing; "
                "put all parts into one folder"
            )
    return parts


def write_joined(model: Gguf, path: Path, *, weights: bool = True) -> None:
    """Write the parts as one file, with the size of the vocabulary in the vocabulary's place.

    What reads its configuration and weights is then done in seconds, and sees every tensor.

    Args:
        weights: False leaves holes where their numbers would be.
    """
    tokens = len(model.metadata.get("tokenizer.ggml.tokens", ()))
    added = {"tokenizer.ggml.tokens": tokens} if tokens else {}
    if (embedding := model.tensors.get("token_embd.weight")) and model.get("vocab_size") is None:
        added[f"{model.architecture}.vocab_size"] = embedding.shape[0]
    _write(model, path, VOCABULARY, added, list(model.tensors.values()), weights)


def write_header(model: Gguf, path: Path) -> None:
    """Write the metadata alone, all of it: what a tokenizer is made from."""
    _write(model, path, (), {}, [])


def _write(
    model: Gguf,
    path: Path,
    without: tuple[str, ...],
    added: dict[str, int],
    tensors: list[Tensor],
    weights: bool = True,
) -> None:
    kept = [
        span
        for key, span in model.spans.items()
        if key not in without and not key.startswith("split.")
    ]
    alignment = int(model.metadata.get("general.alignment", ALIGNMENT))
    with path.open("wb") as file, model.parts[0].open("rb") as first:
        count = len(kept) + len(added)
        file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), count))
        for start, end in kept:
            first.seek(start)
            _copy(first, file, end - start)
        for key, value in added.items():
            file.write(_text(key) + struct.pack("<II", UINT32, value))
        offset = 0
        for tensor in tensors:
            sizes = tuple(reversed(tensor.shape))
            shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            file.write(_text(tensor.name) + shape + struct.pack("<IQ", tensor.kind, offset))
            offset += _aligned(tensor.nbytes, alignment)
        if not weights:
            file.truncate(_aligned(file.tell(), alignment) + offset)
            return
        for tensor in tensors:
            file.write(bytes(-file.tell() % alignment))
            with tensor.part.open("rb") as source:
                source.seek(tensor.start)
                _copy(source, file, tensor.nbytes)
        file.write(bytes(-file.tell() % alignment))


def _copy(source: Any, target: Any, nbytes: int) -> None:
    while nbytes:
        block = source.read(min(nbytes, 16 * 2**20))
        if not block:
            raise OSError("a file became shorter while it was read")
        target.write(block)
        nbytes -= len(block)


def _read_part(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]], list[Tensor]]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UnusableModelError(_broken(path, "it does not begin as a GGUF file does"))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                metadata, spans, table = _Header(content).read()
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError, MemoryError):
        raise UnusableModelError(_broken(path, "its header is cut off or damaged")) from None
    except _Unreadable as fault:
        raise UnusableModelError(_broken(path, str(fault))) from None
    size = path.stat().st_size
    tensors = []
    for name, shape, kind, start in table:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        nbytes = math.prod(shape) // block * block_bytes
        if start + nbytes > size:
            ends = f"its {name} ends at byte {start + nbytes:,} and the file at {size:,}"
            raise UnusableModelError(_broken(path, ends))
        tensors.append(Tensor(name, shape, kind, path, start, nbytes))
    return metadata, spans, tensors


def _broken(path: Path, fault: str) -> str:
    return (
        f"{path.name} cannot be read as a language model ({fault}); "
        "check that it is complete, or download it again"
    )


class _Unreadable(Exception):
    """What a header holds that this reader does not know."""


class _Header:
    """Reads from the start of a file to the end of its tensor table."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._place = 4

    def read(
        self,
    ) -> tuple[
        dict[str, Any],
        dict[str, tuple[int, int]],
        list[tuple[str, tuple[int, ...], int, int]],
    ]:
        """(metadata, the bytes of each entry, (name, shape, kind, start) of each tensor)."""
        version, tensors, entries = self._numbers("IQQ")
        if version not in VERSIONS:
            raise _Unreadable(f"GGUF version {version} is none of {', '.join(map(str, VERSIONS))}")
        metadata: dict[str, Any] = {}
        spans: dict[str, tuple[int, int]] = {}
        for _ in range(entries):
            start = self._place
            key = self._string()
            metadata[key] = self._value(*self._numbers("I"))
            spans[key] = (start, self._place)
        table = []
        for _ in range(tensors):
            name = self._string()
            (count,) = self._numbers("I")
            sizes = self._numbers(f"{count}Q")
            kind, offset = self._numbers("IQ")
            if kind not in GGMLQuantizationType.__members__.values():
                raise _Unreadable(f"{name} is stored as type {kind}, which gguf does not know")
            table.append((name, tuple(reversed(sizes)), kind, offset))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Unreadable(f"its alignment is {alignment}")
        data = _aligned(self._place, alignment)
        return metadata, spans, [(*entry, data + offset) for *entry, offset in table]

    def _numbers(self, kinds: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{kinds}", self._content, self._place)
        self._place += struct.calcsize(f"<{kinds}")
        return values

    def _string(self) -> str:
        (length,) = self._numbers("Q")
        text = self._content[self._place : self._place + length]
        if len(text) != length:
            raise IndexError
        self._place += length
        return text.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise _Unreadable(f"its metadata has a value of type {kind}")
        element, count = self._numbers("IQ")
        if element in NUMBERS:
            return list(self._numbers(f"{count}{NUMBERS[element]}"))
        return [self._value(element) for _ in range(count)]


def _aligned(size: int, alignment: int) -> int:
    return size + -size % alignment


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()
