"""Weights that are read here are those that transformers and the gguf library read, bit for bit."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from dynamickv.models import conversion, gguf_weights
from dynamickv.models import gguf as files
from tests.engine.models.gguf_file import write_model
from tests.engine.tiny import GEOMETRY, tiny_model, vocabulary_size

WIDTH = 256
"""A row of the largest blocks."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", gguf_weights.READ_HERE)
def test_a_conversion_is_byte_for_byte_the_one_through_transformers_reader(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "a.gguf", model_of(family), family)
    own = Mock(wraps=gguf_weights.read_weights)
    monkeypatch.setattr(gguf_weights, "read_weights", own)
    here = contents(conversion.converted(path))
    monkeypatch.setattr(gguf_weights, "READ_HERE", {})
    monkeypatch.setenv("DYNAMICKV_CACHE", str(tmp_path / "other"))
    assert contents(conversion.converted(path)) == here
    assert own.call_count == 1


def model_of(family: str) -> PreTrainedModel:
    """A tiny one with tied embeddings."""
    if family != "gemma2":
        return tiny_model(family, tie_word_embeddings=True)
    geometry = {**GEOMETRY, "vocab_size": vocabulary_size(), "tie_word_embeddings": True}
    return Gemma2ForCausalLM(Gemma2Config(**geometry))


def contents(folder: Path) -> dict[str, bytes]:
    """What a folder's files hold, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
)
def test_blocks_unpack_as_the_gguf_library_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = gguf.GGMLQuantizationType[kind]
    _, block_bytes = gguf.GGML_QUANT_SIZES[quantized]
    blocks_in_row = WIDTH // gguf.GGML_QUANT_SIZES[quantized][0]
    # Small bytes, so that no scale is infinite.
    rows = np.random.default_rng(0).integers(0, 60, (37, blocks_in_row * block_bytes), np.uint8)
    path = tmp_path / "rows.bin"
    path.write_bytes(b"before" + rows.tobytes() + b"behind")
    tensor = files.Tensor("rows", (37, WIDTH), int(quantized), path, len(b"before"), rows.nbytes)
    # So that the last piece is a smaller one.
    monkeypatch.setattr(gguf_weights, "UNPACKED_AT_ONCE", 4 * WIDTH)
    found = gguf_weights.unpacked(tensor)
    assert found.shape == (37, WIDTH)
    assert found.tobytes() == gguf.dequantize(rows, quantized).tobytes()
    assert len(np.unique(found)) > 10
