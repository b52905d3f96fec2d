"""Running it for others: models that fit, one in memory, health, logs without text, options."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import io
import json
import logging
import pickle
import sys
import types
import weakref
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

import app as package
import dynamickv as dkv
from app.inputs import build_request
from app.serving import logs, zero_gpu
from app.serving.health import health
from app.serving.model_host import ModelHost
from app.serving.sealed import SENTENCE
from app.serving.turns import Turns
from dynamickv.fast.packed import PackedWeights
from tests.app.pages import Page, asking, filled
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

ROOT = Path(package.__file__).parents[1]
SECRET = "xyzzy-plugh-4711"


@pytest.fixture(scope="module")
def llm() -> dkv.LoadedModel:
    return tiny_llm()


# Models.


def test_loading_another_model_frees_the_one_before() -> None:
    host = ModelHost("one", loader=lambda name: tiny_llm(), also=["two"])
    first = weakref.ref(host.get("one").model)
    weight = weakref.ref(next(iter(host.get("one").model.parameters())))
    host.get("two")
    gc.collect()
    assert first() is None
    assert weight() is None
    assert host.loaded() == "two"
    assert host.get("one").name == "tiny"  # and back
    assert host.loaded() == "one"


def test_a_model_that_cannot_fit_is_refused_before_the_other_is_given_up(
    monkeypatch: pytest.MonkeyPatch, llm: dkv.LoadedModel
) -> None:
    monkeypatch.setattr(dkv, "free_memory", lambda: ("cpu", 2**30))
    loaded: list[str] = []

    def load(name: str) -> dkv.LoadedModel:
        loaded.append(name)
        return llm

    host = ModelHost("tiny", loader=load)
    host.get("tiny")
    with pytest.raises(
        ValueError, match=r"llama-3-8b needs about \d+\.\d GiB and 1.0 GiB are free"
    ):
        host.get("llama-3-8b")
    assert loaded == ["tiny"]
    assert host.loaded() == "tiny"


def test_the_catalogue_says_size_licence_context_and_whether_it_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dkv, "free_memory", lambda: ("cpu", 4 * 2**30))
    rows = {row["name"]: row for row in ModelHost().describe()}
    assert set(rows) == set(dkv.KNOWN_MODELS)
    assert rows["smollm2-135m"]["fits"]
    assert not rows["llama-3-8b"]["fits"]
    assert rows["llama-3-8b"]["gated"]
    assert len(rows["qwen2-7b"]["revision"]) == 40
    shown = dict((name, text) for text, name in ModelHost().choices())
    assert "does not fit here" in shown["llama-3-8b"]
    assert "Apache-2.0" in shown["smollm2-135m"]
    assert "8,192 tokens" in shown["smollm2-135m"]
    assert shown["smollm2-135m"].endswith("fits here)")


@pytest.mark.parametrize("name", ["evil/repo", "/etc", "", "x" * 301, None, 7, ["tiny"]])
def test_only_listed_models_are_loaded_unless_told_otherwise(name: Any) -> None:
    with pytest.raises(ValueError, match="Unknown model"):
        ModelHost().check(name)
    if isinstance(name, str) and 0 < len(name) <= 300:
        assert ModelHost(allow_any=True).check(name) == name
    else:
        with pytest.raises(ValueError, match="Unknown model"):
            ModelHost(allow_any=True).check(name)


def test_a_folder_s_place_is_not_told(llm: dkv.LoadedModel) -> None:
    def fail(name: str) -> dkv.LoadedModel:
        raise ValueError(f"{name} cannot be read")

    host = ModelHost("/srv/secret/models/mine", loader=fail)
    host.start()
    host.wait(5)
    assert host.state().message == "mine did not load: mine cannot be read"
    assert "secret" not in json.dumps(health(host, Turns()))
    assert host.choices()[0][0] == "mine"


def test_the_page_says_how_a_ready_model_computes(llm: dkv.LoadedModel) -> None:
    fast = dataclasses.replace(llm, packed=PackedWeights(llm.model))
    for model, computes in ((llm, "float32"), (fast, "fast products")):
        host = ModelHost("tiny", loader=lambda _, model=model: model)
        host.load_default()
        assert host.state().message == f"tiny ready · {computes} on cpu"


# Health.


def test_health_says_ready_model_and_queue(llm: dkv.LoadedModel) -> None:
    host, turns = ModelHost("tiny", loader=lambda _: llm), Turns()
    assert not health(host, turns)["ready"]
    host.load_default()
    turns.join("a").wait(0)
    turns.join("b")
    assert health(host, turns) == {
        "ready": True,
        "model": {"name": "tiny", "state": "ready", "loaded": "tiny"},
        "queue": {"running": 1, "waiting": 1},
        "version": dkv.__version__,
    }


# Logs.


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the log gets, at the level that says most."""
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    before = {name: logging.getLogger(name) for name in logs.OURS}
    kept = {name: (x.handlers[:], x.level, x.propagate) for name, x in before.items()}
    logs.set_up("debug")
    yield written
    for name, (handlers, level, propagate) in kept.items():
        before[name].handlers, before[name].propagate = handlers, propagate
        before[name].setLevel(level)


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_a_run_is_logged_without_its_text(llm: dkv.LoadedModel, log: io.StringIO) -> None:
    page = Page(ModelHost("tiny", loader=lambda _: llm))
    texts = {"document": f"{DOCUMENT} {SECRET}", "question": f"{QUESTION} {SECRET}"}
    list(page.explore.run.begin(asking(SECRET), *filled(**texts)))
    last = page.press_run(SECRET, **texts)
    assert last[0]["message"] == "Done."
    answer = last[2]["record"]["runs"][0]["answer"]
    page.endpoint("compare")(*texts.values(), ["FullKV"], 40, 4, "tiny")
    runs = [line for line in lines(log) if line["event"] == "run finished"]
    assert len(runs) == 2
    assert runs[0]["methods"] == ["FullKV", "SnapKV"]
    assert runs[0]["prompt_tokens"] > 100
    assert SECRET not in log.getvalue()
    assert answer not in log.getvalue()


def test_who_waits_is_told_how_long_the_run_before_takes_itself(llm: dkv.LoadedModel) -> None:
    page = Page(ModelHost("tiny", loader=lambda _: llm))

    def told(max_new_tokens: int) -> float:
        """Seconds that the queue says while a run of so many tokens is in it."""
        values = filled(methods=[], max_new_tokens=max_new_tokens)
        going = page.explore.run.run(asking(), *values)
        next(going)
        with closing(going), page.turns.join("b") as behind:
            seconds = behind.place().seconds
            assert seconds is not None
            return seconds

    page.press_run(methods=[])
    assert told(500) > 3 * told(2)


def test_a_failed_run_is_logged_without_its_text(
    llm: dkv.LoadedModel, log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"cannot do {SECRET}")

    monkeypatch.setattr(dkv, "compare_stream", fail)
    page = Page(ModelHost("tiny", loader=lambda _: llm))
    last = page.press_run(document=f"{DOCUMENT}{SECRET}")
    assert last[0]["message"].startswith("The run failed (RuntimeError)")
    assert SECRET not in str(last)
    with pytest.raises(gr.Error, match="could not be carried out"):
        page.endpoint("compare")(f"{DOCUMENT}{SECRET}", QUESTION, ["FullKV"], 40, 4, "tiny")
    (first, second) = [line for line in lines(log) if line["level"] == "error"]
    assert (first["error"], second["error"]) == ("RuntimeError", "RuntimeError")
    assert second["handler"] == "compare"
    assert any(place.startswith("app.serving.comparisons:") for place in first["at"])
    assert SECRET not in log.getvalue()


def test_a_line_cannot_be_forged(log: io.StringIO) -> None:
    logging.getLogger("app").info("x", extra={"methods": 'a\n{"event": "forged"}'})
    assert [line["event"] for line in lines(log)] == ["x"]


def test_the_level_is_obeyed(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", log)
    logs.set_up("warning")
    logging.getLogger("app").info("quiet")
    logging.getLogger("app").warning("loud")
    assert [line["event"] for line in lines(log)] == ["loud"]


@pytest.mark.parametrize(
    "call",
    [
        lambda page: page.explore.form.count(7, None, "tiny"),
        lambda page: list(page.explore.run.begin(None, *filled(methods=[[]]))),
        lambda page: page.explore.form.lock_reference(7),
        lambda page: page.endpoint("compare")(DOCUMENT, QUESTION, [[]]),
    ],
    ids=["method", "generator", "static", "function"],
)
def test_surprises_are_one_sentence(host: ModelHost, call: Any) -> None:
    with pytest.raises(gr.Error) as caught:
        call(Page(host))
    assert SENTENCE in str(caught.value.message)


def test_running_out_of_memory_is_said_on_the_page_and_the_next_run_works(
    llm: dkv.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(ModelHost("tiny", loader=lambda _: llm))

    def fail(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("dynamickv.answer.prune", fail)
        last = page.press_run()
        assert last[0]["state"] == "error"
        assert "choose fewer methods or lower the capacity" in last[0]["message"]
        with pytest.raises(gr.Error, match="Out of memory while choosing"):
            page.endpoint("compare")(DOCUMENT, QUESTION, ["FullKV"], 40, 4, "tiny")
    assert page.turns.counts() == {"running": 0, "waiting": 0}
    last = page.press_run()
    assert last[0]["message"] == "Done."


# ZeroGPU.


class FakeSpaces(types.ModuleType):
    """The `spaces` package's contract: arguments and results cross to another process as pickles,
    and the duration is asked with the function's own arguments."""

    def __init__(self) -> None:
        super().__init__("spaces")
        self.asked: list[int] = []

    def GPU(self, *, duration: Any) -> Any:
        def decorate(function: Any) -> Any:
            def across(*args: Any) -> Generator[Any, None, None]:
                self.asked.append(duration(*args))
                for value in function(*pickle.loads(pickle.dumps(args))):
                    yield pickle.loads(pickle.dumps(value))

            return across

        return decorate


def test_on_zero_gpu_a_run_crosses_to_another_process_and_back(
    llm: dkv.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces = FakeSpaces()
    monkeypatch.setitem(sys.modules, "spaces", spaces)
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    host = ModelHost("tiny", loader=lambda _: llm)
    host.load_default()
    page = Page(host)
    last = page.press_run()
    assert last[0]["message"] == "Done."
    assert last[2]["ready"] is False  # the prefill stays in the other process
    record = page.endpoint("compare")(DOCUMENT, QUESTION, ["SnapKV"], 40, 6, "tiny")
    assert record["runs"][1]["token_ids"] == last[2]["record"]["runs"][1]["token_ids"]
    assert len(spaces.asked) == 2
    assert all(zero_gpu.SHORTEST <= seconds <= zero_gpu.LONGEST for seconds in spaces.asked)
    asked = gr.EventData(None, {"key": last[2]["key"]})
    *_, read = page.explore.what_if.read(asking(), asked)
    assert "keeps no prompt for what-if" in read[0]["message"]


def test_the_estimate_grows_with_the_work_and_stays_within_the_quota() -> None:
    short, long = zero_gpu.estimate(500, 2, 64), zero_gpu.estimate(30_000, 6, 512)
    assert zero_gpu.SHORTEST <= short < long == zero_gpu.LONGEST


def test_elsewhere_nothing_is_decorated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spaces", None)
    function = lambda: None  # noqa: E731
    assert zero_gpu.on_gpu(function, lambda: 1) is function
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    assert not zero_gpu.is_zero_gpu()


def test_requests_can_be_pickled() -> None:
    job = build_request(DOCUMENT, QUESTION, ["SnapKV"], 4, {"capacity": 40})
    assert pickle.loads(pickle.dumps(job)) == job


# Options.


def entry_point() -> Any:
    """app.py, whose name is the package's."""
    spec = importlib.util.spec_from_file_location("entry_point", ROOT / "app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--allow-any-model", "--host", "0.0.0.0"], "would let strangers at 0.0.0.0 load"),
        (["--auth", "nobody"], "give it as USER:PASSWORD"),
        (["--keep", "-1"], "--keep must be at least 0 MiB, got -1"),
        (["--port", "99999"], "--port must be from 0 to 65535, got 99999"),
        (["--log-level", "chatty"], "invalid choice: 'chatty'"),
        (["--model", "nope"], "there is no model 'nope'; give one of smollm2-135m"),
        (["--model", "missing.gguf"], "there is no model 'missing.gguf'; give one of"),
    ],
)
def test_bad_options_end_with_a_sentence(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        entry_point().read_options()
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["SmolLM2-135M", "organisation/model", "none", str(ROOT)])
def test_what_may_be_a_model_is_let_through(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--model", name])
    assert entry_point().read_options().model == name


def test_options_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNAMICKV_AUTH", "ann:from the:environment")
    monkeypatch.setattr(sys, "argv", ["app.py", "--allow-any-model", "--log-level", "error"])
    options = entry_point().read_options()
    assert options.host == "127.0.0.1"
    assert options.auth == ("ann", "from the:environment")
    assert options.allow_any_model
    assert options.keep == 2048
    monkeypatch.setattr(sys, "argv", ["app.py", "--auth", "bob:x", "--host", "0.0.0.0"])
    options = entry_point().read_options()
    assert (options.host, options.auth, options.log_level) == ("0.0.0.0", ("bob", "x"), "info")
