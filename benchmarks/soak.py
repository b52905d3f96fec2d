"""Long uptime: hundreds of comparisons on one server, and what they leave behind.

python -m benchmarks.soak [--tiny 500] [--real 50]

Every few comparisons come from a new visitor, with documents of their own: half from gradio_client
(/compare), half from the page's Run, whose records and prefills the server keeps for what-if. That
store is bounded; here it is given so little (`--keep`) that it is full after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import psutil
from gradio_client import Client

import dynamickv as dkv
from benchmarks.report import Row, machine, publish
from benchmarks.server import page, seconds_until_answered
from tests.engine.tiny import tiny_llm

VISIT = 5
"""Comparisons of one visitor."""
WARM_UP = 0.4
"""Share of the comparisons before anything is counted: allocators and bounded stores fill up
first."""


@dataclass(slots=True)
class Soak:
    """What was measured after every visit."""

    resident: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)
    """Processor seconds of the server so far."""
    pace: list[float] = field(default_factory=list)
    """Seconds of the same work every time, which a machine shared with others does now faster, now
    slower."""
    lost: int = 0
    """Answers that gradio_client lost and asked for again."""

    def look(self, process: psutil.Process) -> None:
        """Measure the server once."""
        self.resident.append(process.memory_info().rss)
        self.threads.append(process.num_threads())
        self.files.append(process.num_fds())
        times = process.cpu_times()
        self.worked.append(times.user + times.system)
        self.pace.append(fixed_work())

    def rows(self, name: str) -> list[Row]:
        """The figures: the last fifth against the first one after the warm-up."""
        skip = max(1, round(len(self.resident) * WARM_UP))
        fifth = max(1, (len(self.resident) - skip) // 5)
        costs = [later - earlier for earlier, later in pairwise(self.worked[skip - 1 :])]

        def grown(values: Sequence[float]) -> float:
            return statistics.median(values[-fifth:]) / statistics.median(values[:fifth])

        machine = self.pace[skip:]
        drift = grown(machine)

        def slower(what: str, seconds: Sequence[float]) -> Row:
            even = [one / pace for one, pace in zip(seconds, machine, strict=True)]
            note = f"in units of fixed work, which took {drift:.2f}; {grown(seconds):.2f} as it is"
            return Row(f"{name}: {what} each, last / first fifth", grown(even), "x", "<= 1.1", note)

        return [
            Row(f"{name}: resident memory after", self.resident[-1] / 2**20, "MiB"),
            Row(f"{name}: its growth", 100 * grown(self.resident[skip:]) - 100, "%", "< 5"),
            Row(
                f"{name}: threads at the end, more than after the warm-up",
                self._more(self.threads, skip, fifth),
                "",
                "<= 0",
            ),
            Row(
                f"{name}: open files at the end, more than after the warm-up",
                self._more(self.files, skip, fifth),
                "",
                "<= 0",
            ),
            slower("seconds", self.seconds[skip:]),
            slower("processor seconds", costs),
            Row(f"{name}: answers asked for twice", self.lost, ""),
        ]

    @staticmethod
    def _more(values: list[int], skip: int, fifth: int) -> float:
        """How many more at the end than after the warm-up; they come and go with requests."""
        return statistics.median(values[-fifth:]) - statistics.median(values[skip : skip + fifth])


def fixed_work() -> float:
    """Seconds of some work that never changes: text to numbers and back."""
    record = {str(n): [n / 7] * 20 for n in range(500)}
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        json.loads(json.dumps(record))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def document(number: int, words: int) -> str:
    """A text of about that many words that no other visitor has."""
    names = ("Okafor", "Lind", "Haugen", "Mori", "Castro")
    lines = [
        f"On day {day} of year {number}, {names[day % 5]} counted {number * 37 % 91 + day} boats."
        for day in range(words // 11)
    ]
    return " ".join(lines)


def by_client(url: str, number: int, words: int, model: str, found: Soak) -> float:
    """One comparison as gradio_client makes it; seconds."""
    client = Client(url, verbose=False)
    start = time.perf_counter()
    for turn in range(VISIT):
        asked = (
            document(number * VISIT + turn, words),
            "Who counted boats on day 3?",
            ["FullKV", "DynamicKV"],
            64,
            8,
            model,
        )
        try:
            record = client.predict(*asked, api_name="/compare")
        except CancelledError:
            # gradio_client closes its event stream while it sends the next request, now and then.
            found.lost += 1
            client = Client(url, verbose=False)
            record = client.predict(*asked, api_name="/compare")
        assert len(record["runs"]) == 2
    seconds = (time.perf_counter() - start) / VISIT
    client.close()
    return seconds


def by_page(http: httpx.Client, number: int, words: int, model: str) -> float:
    """The same comparison as the page's Run makes it; seconds."""
    config = http.get("config").json()
    run = next(d["id"] for d in config["dependencies"] if d["api_name"] == "run")
    session = f"soak{number}"
    start = time.perf_counter()
    for turn in range(VISIT):
        text = document(number * VISIT + turn, words)
        values: list[Any] = [text, "Who counted boats on day 3?", ["FullKV", "DynamicKV"]]
        values += [64, 8, 7, "max", "kv_head", 10, 4, 8, False, True, model]
        body = {"data": values, "fn_index": run, "session_hash": session}
        http.post("gradio_api/queue/join", json=body).raise_for_status()
        messages = []
        with http.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as lines:
            for line in lines.iter_lines():
                if line.startswith("data:"):
                    messages.append(json.loads(line[5:]))
        done = next(m for m in messages if m["msg"] == "process_completed")
        assert done["success"], done
        assert "Done." in str(done["output"]), str(done["output"])[:300]
    return (time.perf_counter() - start) / VISIT


def soak(model: str, comparisons: int, words: int, keep: int) -> Soak:
    """That many comparisons on one server that keeps `keep` MiB."""
    found = Soak()
    command = page("--model", model, "--keep", str(keep))
    with command as (server, url), httpx.Client(base_url=url, timeout=600) as http:
        seconds_until_answered(server, f"{url}health")
        process = psutil.Process(server.pid)
        for number in range(max(comparisons // VISIT, 2)):
            if number % 2:
                seconds = by_client(url, number, words, model, found)
            else:
                seconds = by_page(http, number, words, model)
            found.seconds.append(seconds)
            found.look(process)
            print(
                f"{(number + 1) * VISIT:>4} comparisons, {found.resident[-1] / 2**20:.0f} MiB, "
                f"{found.threads[-1]} threads, {found.files[-1]} files, {seconds:.2f} s each",
                file=sys.stderr,
                flush=True,
            )
    return found


def main() -> None:
    """Measure, print, write benchmarks/results/soak-*.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("--tiny", type=int, default=500, help="comparisons on a tiny model")
    parser.add_argument("--real", type=int, default=50, help="comparisons on the embedded model")
    options = parser.parse_args()
    where = machine()
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            llm = tiny_llm()
            llm.model.save_pretrained(folder)
            llm.tokenizer.save_pretrained(folder)
            found = soak(folder, options.tiny, 60, 8)
        publish("soak-tiny", where, found.rows(f"{options.tiny} comparisons, tiny model"))
    if options.real:
        found = soak(dkv.DEFAULT_MODEL, options.real, 300, 64)
        publish("soak-real", where, found.rows(f"{options.real} comparisons, SmolLM2"))


if __name__ == "__main__":
    main()
