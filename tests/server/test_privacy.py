"""What a visitor's text leaves behind on the server: nothing in files, nothing in the log."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from tests.app.pages import filled
from tests.engine.tiny import DOCUMENT, QUESTION
from tests.server.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
SECRET = "grindylow-2718"


def files_with(folder: Path, text: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


def test_an_upload_is_deleted_once_it_is_read(server: Server) -> None:
    content = f"{DOCUMENT} {SECRET}".encode()
    sent = server.http.post("gradio_api/upload", files={"files": ("notes.txt", content)})
    path = sent.json()[0]
    assert files_with(server.uploads, SECRET.encode())
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    *_, done = server.call({"fn_index": server.function("upload"), "data": [file]})[1]
    assert SECRET in done["output"]["data"][0]
    assert files_with(server.uploads, SECRET.encode()) == []


def test_a_run_writes_no_file_and_no_text_to_the_log(
    server: Server, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    values: list[Any] = [f"{DOCUMENT} {SECRET}", f"{QUESTION} {SECRET}", ["SnapKV"], 40]
    with caplog.at_level(logging.DEBUG, "app"):
        page = filled(document=values[0], question=values[1], max_new_tokens=4)
        *_, done = server.call({"fn_index": server.function("run"), "data": page}, "private")[1]
        assert "Done." in str(done["output"])
        body = {"data": [*values, 4, "tiny"]}
        assert server.http.post("gradio_api/run/compare", json=body).status_code == 200
        # Refused in each of the ways there are.
        for broken in (
            {"data": values},
            {"data": [*values, 10**9, "tiny"]},
            {"data": [*values, 4, "nonesuch"]},
            {"data": [values[0], values[1], "SnapKV", 40, 4, "tiny"]},
        ):
            refused = server.http.post("gradio_api/run/compare", json=broken)
            assert 400 <= refused.status_code < 500
    assert "run finished" in caplog.text
    written = capfd.readouterr()
    for log in (caplog.text, written.out, written.err):
        assert SECRET not in log
    assert files_with(server.uploads, SECRET.encode()) == []


def test_the_page_names_no_other_host_and_carries_its_version(server: Server) -> None:
    page = server.http.get("")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    outside = re.findall(
        r"""<(?:script|img|iframe)\b[^>]*src=["'](?:https?:)?//[^"']*""", page.text
    )
    assert outside == []
    config = server.http.get("config").json()
    footer = next(
        c["props"] for c in config["components"] if c["props"].get("elem_id") == "dkv-version"
    )
    assert re.fullmatch(r"DynamicKV Explorer \d+\.\d+\.\d+", footer["value"])
    assert config["analytics_enabled"] is False


def test_what_the_page_fetches_is_handed_on_when_node_renders_it(server: Server) -> None:
    """With GRADIO_SSR_MODE a Node server stands in front and hands on a few prefixes only."""
    scripts = (ROOT / "app" / "components" / "static").glob("*.js")
    asked = {
        path for s in scripts for path in re.findall(r"\$\{root\}(/[^`\"]+)", s.read_text("utf-8"))
    }
    assert asked == {
        f"/gradio_api/explorer/{name}" for name in ("plotly.js", "offline.html", "preview.png")
    }
    for path in asked:
        assert server.http.get(path).status_code == 200


@pytest.mark.parametrize("path", ["health", "gradio_api/health"])
def test_health_is_served(server: Server, path: str) -> None:
    report = server.http.get(path)
    assert report.status_code == 200
    assert report.headers["cache-control"] == "no-store"
    assert set(report.json()) == {"ready", "model", "queue", "version"}
