"""Out of memory, simulated where it can happen: one sentence, everything given back, and the next
run works.
"""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import dynamickv as dkv
from dynamickv import answer, cli, memory
from dynamickv.models.faults import unreadable
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

compare = sys.modules["dynamickv.compare"]  # the module, not its function of that name
METHODS = [dkv.FullKV(), dkv.SnapKV(capacity=40)]
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.fixture(scope="module")
def llm() -> dkv.LoadedModel:
    return tiny_llm()


def run(llm: dkv.LoadedModel) -> dkv.Trace:
    return dkv.compare(llm, DOCUMENT, QUESTION, methods=METHODS, max_new_tokens=6)


class Failing:
    """A function that runs out of memory at its `at`-th call, holding a tensor that must go."""

    def __init__(self, function: Any, error: Exception, at: int) -> None:
        self.function, self.error, self.left = function, error, at
        self.held: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left:
            return self.function(*args, **kwargs)
        large = torch.zeros(1000)
        self.held.append(weakref.ref(large))
        raise self.error


STAGES = {
    "prefill": (compare, "prefill_prompt", 1, "reading the prompt: shorten the document"),
    "pruning": (answer, "prune", 2, "choosing what to keep: choose fewer methods or lower"),
    "decode": (answer.Answer, "step", 3, "answering: choose fewer methods, or lower the capacity"),
}


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("stage", STAGES)
def test_running_out_is_one_sentence_and_leaves_nothing(
    llm: dkv.LoadedModel, monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception
) -> None:
    expected = run(llm).runs[1].token_ids
    where, name, at, sentence = STAGES[stage]
    real = getattr(where, name)
    failing = Failing(real, error, at)
    prefills: list[weakref.ref[Any]] = []

    def keep(prefill: dkv.Prefill) -> None:
        prefills.append(weakref.ref(prefill.layers[0].keys))

    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda *args, **kwargs: failing(*args, **kwargs))
        stream = dkv.compare_stream(
            llm, DOCUMENT, QUESTION, methods=METHODS, max_new_tokens=6, on_prefill=keep
        )
        with pytest.raises(dkv.OutOfMemory, match=sentence):
            list(stream)
    del stream
    error.__traceback__ = None
    gc.collect()
    assert failing.held
    assert all(reference() is None for reference in [*failing.held, *prefills])
    assert run(llm).runs[1].token_ids == expected


def test_other_errors_stay_what_they_are(
    llm: dkv.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(answer.Answer.step, RuntimeError("no such kernel"), 1)
    monkeypatch.setattr(answer.Answer, "step", lambda *args: failing(*args))
    with pytest.raises(RuntimeError, match="no such kernel"):
        run(llm)


def test_the_command_line_says_it_without_a_traceback(
    llm: dkv.LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "d.txt").write_text(DOCUMENT)
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: llm)
    failing = Failing(compare.prefill_prompt, MemoryError(), 1)
    monkeypatch.setattr(compare, "prefill_prompt", failing)
    arguments = ["--document", str(tmp_path / "d.txt"), "--question", QUESTION]
    code = cli.main(["compare", *arguments, "--output", str(tmp_path / "run.json")])
    assert code == 2
    assert "error: Out of memory while reading the prompt" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def group(folder: Path, limit: str, used: int, cached: int) -> Path:
    (folder / "memory.max").write_text(limit)
    (folder / "memory.current").write_text(str(used))
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return folder


def test_free_memory_is_what_the_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(memory, "CGROUP", group(tmp_path, "1000000", 400_000, 100_000))
    assert dkv.free_memory() == ("cpu", 700_000)
    monkeypatch.setattr(memory, "CGROUP", group(tmp_path, "max\n", 400_000, 100_000))
    device, free = dkv.free_memory()
    assert device == "cpu"
    assert free > 10**8


def test_every_known_model_is_pinned_and_says_what_it_needs() -> None:
    papers = [known for known in dkv.KNOWN_MODELS.values() if "the paper's" in known.description]
    assert len(papers) == 4
    for name, known in dkv.KNOWN_MODELS.items():
        assert known.name == name == name.lower()
        assert known.revision is not None
        assert len(known.revision) == 40
        assert int(known.revision, 16) >= 0
        assert known.licence
        assert known.context >= 8192
        assert known.bytes_needed(2) > 2 * known.parameters > 10**8


def test_the_default_s_numbers_are_the_model_s(llm: dkv.LoadedModel) -> None:
    known = dkv.KNOWN_MODELS[dkv.DEFAULT_MODEL]
    assert known.kv_values == 2 * 30 * 3 * 64
    prefill = dkv.prefill(llm, DOCUMENT, QUESTION)
    geometry = llm.geometry
    per_token = 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim
    assert prefill.kv_bytes == 4 * per_token * prefill.length  # the formula the catalogue uses


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        ("403 Client Error: access to model x is gated", "accept its terms there and log in"),
        ("401 Client Error. Cannot access gated repo", "needs permission on the hub"),
        ("Repository Not Found for url 404", "there is no model x on the hub"),
        ("offline mode is on", "is not on this machine and the hub cannot be reached"),
    ],
)
def test_gated_and_missing_models_are_said_clearly(error: str, sentence: str) -> None:
    assert sentence in unreadable("x", OSError(error))
