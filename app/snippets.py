"""The same comparison outside this page: ready to paste, and run by the tests."""

from __future__ import annotations

PYTHON = """\
import dynamickv as dkv

llm = dkv.load_model("{model}")
trace = dkv.compare(
    llm,
    document=open("report.txt", encoding="utf-8").read(),
    question="Which bank was reinforced?",
    methods=[dkv.FullKV(), dkv.DynamicKV(capacity=128)],
    max_new_tokens=64,
)
for run in trace.runs:
    print(f"{{run.method:10}} {{run.kv_bytes / 2**20:6.1f}} MiB  {{run.answer}}")
trace.save("run.json.gz")  # open it on this page
"""

CLIENT = """\
from gradio_client import Client

client = Client("{url}")
record = client.predict(
    document=open("report.txt", encoding="utf-8").read(),
    question="Which bank was reinforced?",
    methods=["FullKV", "DynamicKV"],
    capacity=128,
    max_new_tokens=64,
    api_name="/compare",
)
for run in record["runs"]:
    print(run["method"], run["kept_fraction"], run["answer"])
"""

CURL = """\
EVENT=$(curl -s {url}/gradio_api/call/compare \\
  -H 'Content-Type: application/json' \\
  -d '{{"data": ["A long document ...", "A question?",
       ["FullKV", "DynamicKV"], 128, 64, "{model}"]}}' \\
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["event_id"])')
curl -sN {url}/gradio_api/call/compare/$EVENT
"""


def snippets(url: str, model: str) -> dict[str, str]:
    """Python, gradio_client and curl, for this address and model."""
    return {
        name: text.format(url=url.rstrip("/"), model=model)
        for name, text in (("python", PYTHON), ("client", CLIENT), ("curl", CURL))
    }
