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
    max_new_tokens={max_new_tokens},{more}
)
for run in trace.runs:
    print(f"{{run.method:12}} {{run.kv_bytes / 2**20:6.1f}} MiB  {{run.answer}}")
trace.save("run.json.gz")  # open it on this page
"""

CLIENT = """\
{lacks}from gradio_client import Client

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
{lacks}python3 - > request.json <<'END'
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
    *,
    truncate: bool = False,
    decoding: dkv.Decoding | None = None,
) -> dict[str, str]:
    """Python, gradio_client, curl and MCP, for this address and these values. Texts become
    literals of the language they stand in; what the endpoint takes no argument for is named in a
    comment.
    """
    url = url.rstrip("/")
    more = {
        "question_aware": "" if question_aware else "False",
        "truncate": "True" if truncate else "",
        "decoding": "" if decoding is None else constructor(decoding),
    }
    said = {name: code for name, code in more.items() if code}
    set_by_hand = {name for method in methods for name in given(method)} - {"capacity"}
    lacks = [*sorted(set_by_hand), *said]
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
        "more": "".join(f"\n    {name}={code}," for name, code in said.items()),
        "lacks": f"# Without {', '.join(lacks)}: the Python code has them.\n" if lacks else "",
    }
    code = {
        name: text.format(**values)
        for name, text in (("python", PYTHON), ("client", CLIENT), ("curl", CURL))
    }
    server = {"mcpServers": {"dynamickv": {"url": f"{url}/gradio_api/mcp/"}}}
    return code | {"mcp": json.dumps(server, indent=2)}


def constructor(value: dkv.CompressionMethod | dkv.Decoding) -> str:
    """As code: `dkv.DynamicKV(capacity=128)`, defaults left out."""
    arguments = ", ".join(f"{name}={setting!r}" for name, setting in given(value).items())
    return f"dkv.{type(value).__name__}({arguments})"


def given(value: dkv.CompressionMethod | dkv.Decoding) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    return {
        field.name: getattr(value, field.name)
        for field in fields(value)
        if field.default is MISSING or getattr(value, field.name) != field.default
    }
