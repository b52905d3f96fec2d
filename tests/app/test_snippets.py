"""The form's comparison as code, whatever its texts hold, and the code runs."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest

import dynamickv as dkv
from app.snippets import snippets
from dynamickv.record.trace import Trace
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

HARD = "A \"question\" with \\ and \n and 'quotes' $HOME `id` {braces} END \u202e 港?"


def test_snippets_hold_the_form_s_values_whatever_the_text() -> None:
    methods = [dkv.FullKV(), dkv.DynamicKV(capacity=96, window_size=16, pooling="avg")]
    code = snippets("http://127.0.0.1:7860/", "smollm2-135m", HARD, methods, 96, 12, False)
    calls = {}
    for name in ("python", "client"):
        tree = ast.parse(code[name])
        calls[name] = {
            keyword.arg: keyword.value for node in ast.walk(tree) if isinstance(node, ast.Call)
            for keyword in node.keywords
        }  # fmt: skip
        assert ast.literal_eval(calls[name]["question"]) == HARD
        assert ast.literal_eval(calls[name]["max_new_tokens"]) == 12
    assert ast.literal_eval(calls["python"]["question_aware"]) is False
    assert "dkv.DynamicKV(capacity=96, window_size=16, pooling='avg')" in code["python"]
    assert "http://127.0.0.1:7860/gradio_api" in code["curl"]
    server = json.loads(code["mcp"])["mcpServers"]["dynamickv"]
    assert server["url"] == "http://127.0.0.1:7860/gradio_api/mcp/"


def test_code_holds_the_whole_run_or_says_what_it_lacks() -> None:
    decoding = dkv.Decoding(budget=64, buffer=8)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=96, window_size=16)]
    code = snippets("http://x", "tiny", "?", methods, 96, 12, truncate=True, decoding=decoding)
    assert (
        "    truncate=True,\n    decoding=dkv.Decoding(budget=64, buffer=8),\n)" in code["python"]
    )
    for name in ("client", "curl"):
        first = code[name].splitlines()[0]
        assert first == "# Without window_size, truncate, decoding: the Python code has them."
    plain = snippets("http://x", "tiny", "?", [dkv.SnapKV(capacity=96)], 96, 12)
    assert not any("Without" in text for text in plain.values())


def test_the_curl_snippet_sends_the_form_s_values(tmp_path: Path) -> None:
    (tmp_path / "document.txt").write_text("Grüße ${HOME}\n", encoding="utf-8")
    code = snippets("http://127.0.0.1:1/", "tiny", HARD, [dkv.FullKV()], 96, 12)["curl"]
    request = code.split("EVENT=", 1)[0]
    subprocess.run(["bash", "-c", request], cwd=tmp_path, check=True, timeout=60)
    data = json.loads((tmp_path / "request.json").read_text())["data"]
    assert data == ["Grüße ${HOME}\n", HARD, ["FullKV"], 96, 12, "tiny"]


def test_the_python_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    llm = tiny_llm()
    monkeypatch.setattr(dkv, "load_model", lambda name: llm)
    methods = [dkv.FullKV(), dkv.SnapKV(capacity=40)]
    decoding = dkv.Decoding(budget=40, buffer=2)
    exec(snippets("http://x", "tiny", QUESTION, methods, 40, 4, decoding=decoding)["python"], {})
    runs = Trace.load("run.json.gz").runs
    assert [run.method for run in runs] == ["FullKV", "SnapKV"]
    assert runs[1].decoding == {"budget": 40, "buffer": 2}
    assert "MiB" in capsys.readouterr().out
