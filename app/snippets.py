"""The same comparison outside this page, with the form's values: ready to paste, and run by the
tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import dynamickv as dkv

DOCUMENT_FILE = "document.txt"
"""Where the snippets expect the document: a text may be too long to stand in code."""

PYTHON = """\
import dynamickv as dkv

llm = dkv.load_model({model})
trace = dkv.compare(
    llm,
    document=open({file}, encoding="utf-8").read(),
    question={question},
    methods=[
{methods}    ],
    max_new_tokens={max_new_tokens},{aware}
)
for run in trace.runs:
    print(f"{{run.method:12}} {{run.kv_bytes / 2**20:6.1f}} MiB  {{run.answer}}")
trace.save("run.json.gz")  # open it on this page
"""

CLIENT = """\
from gradio_client import Client

client = Client({url})
record = client.predict(
    document=open({file}, encoding="utf-8").read(),
    question={question},
    methods={names},
    capacity={capacity},
    max_new_tokens={max_new_tokens},
    model={model},
    api_name="/compare",
)
for run in record["runs"]:
    print(run["method"], run["kept_fraction"], run["answer"])
"""

CURL = """\
python3 - > request.json <<'END'
import json
document = open({file}, encoding="utf-8").read()
print(json.dumps({{"data": [document, {question},
    {names}, {capacity}, {max_new_tokens}, {model}]}}))
END
EVENT=$(curl -s {plain_url}/gradio_api/call/compare \\
  -H 'Content-Type: application/json' -d @request.json \\
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["event_id"])')
curl -sN {plain_url}/gradio_api/call/compare/$EVENT
"""


def snippets(
    url: str,
    model: str,
    question: str,
    methods: Sequence[dkv.CompressionMethod],
    capacity: int,
    max_new_tokens: int,
    question_aware: bool = True,
) -> dict[str, str]:
    """Python, gradio_client, curl and MCP, for this address and these values. Texts become
    literals of the language they stand in.
    """
    url = url.rstrip("/")
    values: dict[str, Any] = {
        "plain_url": url,
        "url": json.dumps(url),
        "model": json.dumps(model),
        "file": json.dumps(DOCUMENT_FILE),
        "question": repr(question),
        "names": json.dumps([method.name for method in methods]),
        "methods": "".join(f"        {constructor(method)},\n" for method in methods),
        "capacity": int(capacity),
        "max_new_tokens": int(max_new_tokens),
        "aware": "" if question_aware else "\n    question_aware=False,",
    }
    code = {
        name: text.format(**values)
        for name, text in (("python", PYTHON), ("client", CLIENT), ("curl", CURL))
    }
    server = {"mcpServers": {"dynamickv": {"url": f"{url}/gradio_api/mcp/"}}}
    return code | {"mcp": json.dumps(server, indent=2)}


def constructor(method: dkv.CompressionMethod) -> str:
    """A method as code: `dkv.DynamicKV(capacity=128)`, defaults left out."""
    given = [
        f"{field.name}={getattr(method, field.name)!r}"
        for field in fields(method)
        if field.default is MISSING or getattr(method, field.name) != field.default
    ]
    return f"dkv.{type(method).__name__}({', '.join(given)})"
