"""A page in a real browser: one server without a model, one with the embedded model, one
Chromium.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from app.examples import Example
from app.page import build_app, launch_options
from app.serving.model_host import ModelHost
from app.serving.shelf import Shelf
from dynamickv.record.trace import Scores, Trace
from tests.app.synthetic import synthetic_trace

LEFT = re.compile(
    "console: (AbortError: (signal is|BodyStreamBuffer was) aborted|"
    "Unexpected error (Connection errored|404: Not Found))"
)
LOCAL = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:")
HOSTILE = (
    "Cost ${window.pwned=1} and `ticks` and C:\\users\\u0041 {{constructor}} $x^2$ **bold** _it_\n"
    "<img src=x onerror='window.pwned=2'><script>window.pwned=3</script></script></textarea>\n"
    "\tTabs,  double spaces, "
    "emoji 👩\u200d🚀🌊, 港の報告書, e\u0301, \u202ertl\u202c, שלום, \u0000 end\n\n"
) * 6
expect.set_options(timeout=20_000)


def example(id_: str, trace: Trace, folder: Path) -> Example:
    """An example around a synthetic record."""
    path = folder / f"{id_}.json.gz"
    trace.save(path)
    first, last = trace.prompt.document_utf16_span
    document = trace.prompt.text.encode("utf-16-le")[2 * first : 2 * last].decode("utf-16-le")
    return Example(
        id=id_,
        title=id_.capitalize(),
        kind="synthetic",
        question=trace.prompt.question,
        capacity=96,
        max_new_tokens=8,
        document=document,
        run_file=path,
    )


def scored(trace: Trace) -> Trace:
    """The same record with invented scores."""
    table = np.random.default_rng(3).integers(0, 255, (30, trace.prompt.length)).astype(np.uint8)
    runs = [
        replace(run, scores=None if run.method == "FullKV" else Scores.pack(table))
        for run in trace.runs
    ]
    return replace(trace, runs=runs)


def serve(
    host: ModelHost, examples: dict[str, Example], shelf: Shelf | None = None
) -> Iterator[str]:
    """The page on a free port until the tests are done."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    demo = build_app(host, examples, url=f"http://127.0.0.1:{port}", shelf=shelf)
    demo.queue(max_size=24)
    demo.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        **launch_options(),
    )
    yield f"http://127.0.0.1:{port}/"
    demo.close(verbose=False)


def no_model(name: str) -> None:
    raise OSError(f"{name} is not on this machine and there is no network")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Example]:
    """Synthetic records: an ordinary one, a long one, and one whose text attacks the page."""
    folder = tmp_path_factory.mktemp("records")
    traces = {
        "ordinary": synthetic_trace(),
        "long": synthetic_trace(tokens=11_000),
        "hostile": synthetic_trace(document=HOSTILE, capacity=40),
        "fits": synthetic_trace(tokens=60, capacity=512),
        "three": synthetic_trace(methods=("FullKV", "SnapKV", "DynamicKV")),
        "scored": scored(synthetic_trace()),
    }
    answer: dict[str, Any] = {
        "answer": HOSTILE,
        "pieces": [HOSTILE],
        "token_ids": [1],
        "logprobs": [0.0],
        "decode_seconds": [0.0],
        "aligned": None,
    }
    traces["hostile"] = replace(
        traces["hostile"],
        runs=[replace(run, **answer) for run in traces["hostile"].runs],
    )  # fmt: skip
    return {name: example(name, trace, folder) for name, trace in traces.items()}


@pytest.fixture(scope="session")
def page_url(recorded: dict[str, Example]) -> Iterator[str]:
    """A page with recorded runs and no model."""
    yield from serve(ModelHost(loader=no_model), recorded)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def model_url(recorded: dict[str, Example]) -> Iterator[str]:
    """A page with the embedded model."""
    host = ModelHost()
    yield from serve(host, {"ordinary": recorded["ordinary"]})


@pytest.fixture(scope="session")
def browser(chromium_path: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path,
            args=["--no-sandbox", "--disable-background-networking", "--process-per-site"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def window(browser: Browser) -> Iterator[BrowserContext]:
    """One window for the tabs of all tests: the page's scripts are fetched and compiled once.

    One tab stays open and keeps the process of its site alive: loading the page takes 6 s of
    processor time in a process of its own, 3.8 s in one that has shown it before.
    """
    context = browser.new_context(
        viewport={"width": 1400, "height": 900},
        permissions=["clipboard-read", "clipboard-write"],
        reduced_motion="reduce",  # nothing moves by itself; films have their own tests
    )
    keeper = context.new_page()
    keeper.route("**/*", lambda route: route.fulfill(body=""))
    keeper.goto("http://127.0.0.1/")
    yield context
    context.close()


@pytest.fixture
def page(window: BrowserContext) -> Iterator[Page]:
    """A fresh tab that fails the test on any console error, page error or outside request.

    What a page leaves in the window, beyond its tab's session, is cleared behind it. Gradio
    complains of its own requests that leaving the page cuts off, and of the stream it opens after
    that for an event it had just sent, whose session the server has forgotten: a test that loads a
    second page may see both.
    """
    page = window.new_page()
    problems: list[str] = []
    loads: list[Page] = []
    page.on("load", lambda loaded: loads.append(loaded))
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on(
        "console",
        lambda message: (
            problems.append(f"console: {message.text}") if message.type == "error" else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            None if LOCAL.match(request.url) else problems.append(f"outside: {request.url}")
        ),
    )
    yield page
    for tab in window.pages[1:]:  # the first keeps the process
        if LOCAL.match(tab.url):
            tab.evaluate("localStorage.clear()")
        tab.close()
    if len(loads) > 1:
        problems = [problem for problem in problems if not LEFT.match(problem)]
    assert not problems, problems[:5]


@pytest.fixture
def context_offline(browser: Browser) -> Iterator[BrowserContext]:
    """A window without any network."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    yield context
    context.close()


def serious_findings(page: Page) -> list[Any]:
    """What axe-core calls serious or critical."""
    found: dict[str, Any] = Axe().run(page).response
    return [
        (v["id"], v["impact"], [n["target"] for n in v["nodes"]][:4])
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]


def open_page(page: Page, url: str, query: str = "") -> None:
    """Open the page and wait until it is painted, chart included.

    Once in some 250 openings beside other tests the chart did not come within 20 s; why is not
    known, so a second opening is allowed. `test_first_paint_is_a_recorded_run` has none.
    """
    bars = page.locator(".js-plotly-plot .bars path").first
    for last in (False, True):
        page.goto(url + query)
        expect(page.locator(".dkv-card")).to_have_count(2)
        try:
            expect(bars).to_be_attached()
            return
        except AssertionError:
            if last:
                raise


def pick(page: Page, title: str) -> None:
    """Choose an example."""
    page.get_by_label("Example", exact=True).click()
    page.get_by_role("option", name=title, exact=True).click()
