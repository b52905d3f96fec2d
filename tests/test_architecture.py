"""The rules that keep the tree readable and the page safe, checked on the source itself.

A rule looks at one file and names what breaks it. Every rule carries snippets it must reject and
snippets it must accept, so a rule that has stopped seeing anything fails here too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

from tests.drawing import (
    FLOORS,
    between_the_marks,
    block,
    circle_in,
    drawing_of,
    engine_sources,
    imports_of_files,
    upward_imports,
)
from tests.drawing import PAGE as DRAWN_ON
from tests.source import ROOT, Source, dotted

VENDORED = "vendor"


Finder = Callable[[Source], Iterator[tuple[int, str]]]


@dataclass(frozen=True)
class Rule:
    """What must not be found, and where."""

    name: str
    finder: Finder
    scope: tuple[str, ...]
    bad: tuple[str, ...]
    good: tuple[str, ...]
    exempt: tuple[str, ...] = ()
    example_path: str = "app/example.py"

    def files(self) -> list[Path]:
        exempt = {path for pattern in self.exempt for path in ROOT.glob(pattern)}
        found = {path for pattern in self.scope for path in ROOT.glob(pattern)}
        return sorted(path for path in found - exempt if VENDORED not in path.parts)

    def violations(self, source: Source) -> list[str]:
        return [f"{source.path}:{line}: {what}" for line, what in self.finder(source)]


# Helpers: small predicates and finders the rules are made of.


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbids(*packages: str) -> Finder:
    """Importing any of these, or anything inside them."""

    def find(source: Source) -> Iterator[tuple[int, str]]:
        return ((line, f"imports {n}") for line, n in source.imports if is_within(n, packages))

    return find


def allows(family: str, *packages: str) -> Finder:
    """Importing anything of `family` besides these. A family is a top-level package, or "others":
    whatever is neither the standard library nor this project."""

    def in_family(name: str) -> bool:
        top = name.partition(".")[0]
        if family == "others":
            return top not in sys.stdlib_module_names and top not in ("app", "dynamickv")
        return top == family

    def find(source: Source) -> Iterator[tuple[int, str]]:
        for line, name in source.imports:
            if in_family(name) and not is_within(name, packages):
                yield line, f"imports {name}"

    return find


def names_used(*packages: str) -> Finder:
    """Reaching for any of these by its dotted name, without importing it by that name."""

    def find(source: Source) -> Iterator[tuple[int, str]]:
        for node in source.nodes:
            if isinstance(node, ast.Attribute) and dotted(node) in packages:
                yield node.lineno, f"uses {dotted(node)}"

    return find


def both(*finders: Finder) -> Finder:
    return lambda source: (found for finder in finders for found in finder(source))


def global_statements(source: Source) -> Iterator[tuple[int, str]]:
    for node in source.nodes:
        if isinstance(node, ast.Global):
            yield node.lineno, "global " + ", ".join(node.names)


def unsafe_calls(source: Source) -> Iterator[tuple[int, str]]:
    """Loading what can run code: torch.load, numpy's allow_pickle, a model's own code."""
    for call in source.calls:
        if dotted(call.func) == "torch.load":
            yield call.lineno, "torch.load"
    for node in source.nodes:
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.value.lineno, f"{node.arg} is not plainly False"
        elif isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    yield key.lineno, "trust_remote_code in a dictionary"


def highlighted_text(source: Source) -> Iterator[tuple[int, str]]:
    for node in source.nodes:
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        if "HighlightedText" in names:
            yield node.lineno, "HighlightedText"  # type: ignore[attr-defined]


def is_html(node: ast.AST) -> bool:
    return dotted(node) in ("gr.HTML", "gradio.HTML", "HTML")


def html_constructions(source: Source) -> Iterator[ast.Call]:
    """Calls of gr.HTML, and of super().__init__ in its subclasses."""
    yield from (call for call in source.calls if is_html(call.func))
    for node in source.nodes:
        if isinstance(node, ast.ClassDef) and any(map(is_html, node.bases)):
            for call in (inner for inner in ast.walk(node) if isinstance(inner, ast.Call)):
                function = call.func
                if isinstance(function, ast.Attribute) and function.attr == "__init__":
                    yield call


def html_from_values(source: Source) -> Iterator[tuple[int, str]]:
    """A gr.HTML that shows its value as markup: only a template of its own makes it mere data."""
    for call in html_constructions(source):
        keywords = {keyword.arg for keyword in call.keywords}
        if (call.args or "value" in keywords) and "html_template" not in keywords:
            yield call.lineno, "gr.HTML with a value and no static html_template"


def is_assembled(node: ast.AST) -> bool:
    """f-string, concatenation, %, .format(), .join(), .replace(), or a text with placeholders."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and bool(PLACEHOLDER.search(node.value))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("format", "format_map", "join", "replace", "substitute")
    return isinstance(node, ast.JoinedStr | ast.BinOp)


def assembled_templates(source: Source) -> Iterator[tuple[int, str]]:
    keywords = [node for node in source.nodes if isinstance(node, ast.keyword)]
    for keyword in keywords:
        if keyword.arg == "html_template" and is_assembled(keyword.value):
            yield keyword.value.lineno, "html_template put together from parts"


# The page's house, from the front door down: a room imports only from floors below its own, so no
# tab knows another.
PAGE_FLOORS = (
    ("page",),
    ("launch",),
    ("onward",),
    ("explore", "gallery", "lab", "learn", "runs"),
    ("serving", "components", "form", "uploads", "snippets"),
    ("views", "examples", "inputs"),
    ("record", "settings"),
    ("theme", "wording", "threads", "preview"),
)


def page_floor(room: str) -> int:
    """Which floor a file or folder of app/ is on; 0 is the highest."""
    return next(n for n, rooms in enumerate(PAGE_FLOORS) if room in rooms)


def page_imports_upwards(source: Source) -> Iterator[tuple[int, str]]:
    """Imports of another room of the page that is not below this one."""
    room = PurePosixPath(source.path).parts[1].removesuffix(".py")
    for line, name in source.imports:
        family, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if family == "app" and other != room and page_floor(other) <= page_floor(room):
            yield line, f"{room} imports {name}"


PLACEHOLDER = re.compile(r"\{\{|\$\{")
CDN = re.compile(
    r"""(?x)
    //[\w.-]*(cdn|unpkg|jsdelivr|esm\.sh|skypack|googleapis|gstatic|cloudflare|bootstrapcdn)[\w.-]*
    | <(script|link|img|iframe|source)\b[^>]*(src|href)\s*=\s*["']?(https?:)?//
    | (@import|url\(|\bimport\b|\bfrom\b|fetch\(|importScripts\()\s*["'(]*\s*(https?:)?//\w
    | include_plotlyjs\s*=\s*["']cdn
    """
)


def matches(pattern: re.Pattern[str]) -> Finder:
    """Lines of text in which the pattern occurs."""

    def find(source: Source) -> Iterator[tuple[int, str]]:
        for number, line in enumerate(source.text.splitlines(), start=1):
            if match := pattern.search(line):
                yield number, match.group()

    return find


ENGINE = ("dynamickv/**/*.py",)
PAGE = ("app/**/*.py", "app.py")
ALL_CODE = (*ENGINE, *PAGE, "benchmarks/**/*.py")

TRANSFORMERS_INTERNALS = (
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.integrations",
    "transformers.AttentionInterface",
    "transformers.AttentionMaskInterface",
    "transformers.Cache",
    "transformers.DynamicCache",
)

RULES = (
    Rule(
        name="the engine's imports run downwards, floor by floor (tests/drawing.py)",
        finder=upward_imports,
        scope=ENGINE,
        exempt=("dynamickv/__init__.py",),
        bad=(
            "from dynamickv.models import LoadedModel",
            "from ..decoding.decode import extend",
            "def later():\n    from dynamickv.compare import compare",
            "import dynamickv",
            "from dynamickv import retain",
            "import importlib\nimportlib.import_module('dynamickv.cli')",
            "if TYPE_CHECKING:\n    pass\nelse:\n    import dynamickv.models",
        ),
        good=(
            "from dynamickv.reading.store import PrefillStore",
            "from .store import PrefillStore",
            "from dynamickv.methods import SnapKV",
            "from dynamickv.cache import KVCache",
            "if TYPE_CHECKING:\n    from dynamickv.models import LoadedModel",
            "import torch",
        ),
        example_path="dynamickv/reading/example.py",
    ),
    Rule(
        name="engine never imports the page",
        finder=forbids("app", "gradio", "gradio_client", "plotly"),
        scope=ENGINE,
        bad=("import gradio as gr", "from plotly import graph_objects", "from app import theme"),
        good=("import torch", "from dynamickv.record.trace import Trace", "import apparatus"),
    ),
    Rule(
        name="methods import only records and scoring",
        finder=both(
            allows("dynamickv", "dynamickv.records", "dynamickv.scoring", "dynamickv.methods"),
            allows("others", "numpy", "torch"),
            forbids("app"),
        ),
        scope=("dynamickv/methods/**/*.py",),
        bad=(
            "from dynamickv.cache import prune",
            "from ..cache import prune",
            "from dynamickv import compare",
            "import transformers",
        ),
        good=(
            "from dynamickv.records import Retention",
            "from .base import ScoredMethod",
            "from ..scoring import pool",
            "from torch import Tensor\nimport math",
        ),
        example_path="dynamickv/methods/example.py",
    ),
    Rule(
        name="only observe, cache and its layers touch transformers internals",
        finder=both(forbids(*TRANSFORMERS_INTERNALS), names_used(*TRANSFORMERS_INTERNALS)),
        scope=(*ENGINE, *PAGE),
        exempt=("dynamickv/reading/observe.py", "dynamickv/cache.py", "dynamickv/layers/*.py"),
        bad=(
            "from transformers.cache_utils import Cache",
            "from transformers import masking_utils",
            "from transformers import AttentionInterface",
            "import importlib\nimportlib.import_module('transformers.modeling_utils')",
            "import transformers\ntransformers.AttentionInterface.register('x', f)",
        ),
        good=(
            "from transformers import AutoModelForCausalLM, PreTrainedModel",
            "import transformers\ntransformers.__version__",
        ),
    ),
    Rule(
        name="the run record needs only numpy",
        finder=both(allows("dynamickv", "dynamickv.record"), allows("others", "numpy")),
        scope=("dynamickv/record/**/*.py",),
        bad=("import torch", "from dynamickv.records import Retention"),
        good=("import json\nimport numpy as np", "from dynamickv.record.packed import Retained"),
        example_path="dynamickv/record/example.py",
    ),
    Rule(
        name="the page uses the engine's public names",
        finder=both(
            forbids("torch", "transformers"),
            lambda source: (
                (line, what)
                for line, what in allows(
                    "dynamickv", "dynamickv.record.trace", "dynamickv.record.events"
                )(source)
                if not is_public_name(what.removeprefix("imports "))
            ),
        ),
        scope=PAGE,
        bad=(
            "from dynamickv.cache import prune",
            "from dynamickv import cache",
            "import dynamickv.cache",
            "import torch",
        ),
        good=("import dynamickv as dkv", "from dynamickv.record.trace import Trace"),
    ),
    Rule(
        name="only views import plotly",
        finder=forbids("plotly"),
        scope=PAGE,
        exempt=("app/views/**/*.py",),
        bad=("import plotly.graph_objects as go", "from plotly.offline import get_plotlyjs"),
        good=("from app.views import VIEWS",),
    ),
    Rule(
        name="the page's imports run downwards, and no tab knows another",
        finder=page_imports_upwards,
        scope=("app/**/*.py",),
        exempt=("app/__init__.py",),
        bad=(
            "from app.lab.view_model import recorded",
            "from ..runs.handlers import RunsHandlers",
            "from app import page",
            "def f():\n    from app.launch import launch_options",
        ),
        good=(
            "from .view_model import counted",
            "from app.serving.turns import Turns",
            "from app import inputs",
            "from app.wording import count",
        ),
        example_path="app/explore/example.py",
    ),
    Rule(
        name="only layouts, handlers, endpoints and components import gradio",
        finder=forbids("gradio"),
        scope=("app/**/*.py",),
        exempt=(
            "app/page.py",
            "app/*/layout.py",
            "app/*/handlers.py",
            "app/*/handlers/*.py",
            "app/runs/endpoints.py",
            "app/serving/events.py",
            "app/components/**/*.py",
        ),
        bad=("import gradio as gr", "from gradio import themes"),
        good=("import gradient",),
    ),
    Rule(
        name="views know only a record's words and film, numbers as words, and the theme",
        finder=both(
            allows(
                "app",
                "app.views",
                "app.record.film",
                "app.record.words",
                "app.theme",
                "app.wording",
            ),
            allows("dynamickv", "dynamickv.record.trace"),
        ),
        scope=("app/views/**/*.py",),
        bad=(
            "from app.explore.handlers import FormHandlers",
            "from app.record.cards import cards",
            "import dynamickv as dkv",
            "import app.page",
        ),
        good=(
            "from app.record.words import run_names",
            "from app.wording import count",
            "from .base import View",
            "import plotly",
        ),
        example_path="app/views/example.py",
    ),
    Rule(
        name="what a record says needs only the theme and the run record",
        finder=both(
            allows("app", "app.record", "app.theme", "app.wording"),
            allows("dynamickv", "dynamickv.record.trace"),
            forbids("gradio", "plotly"),
        ),
        scope=("app/record/**/*.py",),
        bad=("from app.serving.shelf import Shelf", "import dynamickv", "import plotly"),
        good=(
            "from dynamickv.record.trace import Trace",
            "from app.theme import method_style",
            "from .words import run_names",
        ),
        example_path="app/record/example.py",
    ),
    Rule(
        name="no global statement",
        finder=global_statements,
        scope=ALL_CODE,
        bad=("def f():\n    global state\n    state = 1",),
        good=("STATE = 1  # a global name is not a global statement",),
    ),
    Rule(
        name="nothing that can run a stranger's code is loaded",
        finder=both(
            forbids("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"), unsafe_calls
        ),
        scope=ALL_CODE,
        bad=(
            "import pickle",
            "import torch\ntorch.load('weights.pt')",
            "load(name, trust_remote_code=True)",
            "load(name, trust_remote_code=flag)",
            "options = {'trust_remote_code': True}",
            "np.load(path, allow_pickle=True)",
        ),
        good=("load(name, trust_remote_code=False)", "from safetensors.torch import load_file"),
    ),
    Rule(
        name="no gr.HighlightedText",
        finder=highlighted_text,
        scope=PAGE,
        bad=("gr.HighlightedText()", "from gradio import HighlightedText"),
        good=("gr.HTML(html_template='<p></p>')", "'never HighlightedText'"),
    ),
    Rule(
        name="gr.HTML shows no value as markup",
        finder=html_from_values,
        scope=PAGE,
        bad=(
            "gr.HTML(value=text)",
            "gr.HTML(f'<b>{text}</b>')",
            "class Card(gr.HTML):\n    def __init__(self):\n        super().__init__(value='')",
        ),
        good=("gr.HTML(value=payload, html_template=read('card.html'))", "gr.HTML(elem_id='x')"),
    ),
    Rule(
        name="html_template arguments are static",
        finder=assembled_templates,
        scope=PAGE,
        bad=(
            "gr.HTML(html_template=f'<b>{text}</b>')",
            "gr.HTML(html_template='<b>' + text)",
            "gr.HTML(html_template='<b>%s</b>' % text)",
            "gr.HTML(html_template='<b>{}</b>'.format(text))",
            "gr.HTML(html_template='<b>${value}</b>')",
        ),
        good=("gr.HTML(html_template='<b></b>')", "gr.HTML(html_template=read('card.html'))"),
    ),
    Rule(
        name="template files have no placeholders",
        finder=matches(PLACEHOLDER),
        scope=("app/**/*.html",),
        bad=("<p>{{value}}</p>", "<p>${value}</p>"),
        good=("<p class='answer'></p>",),
        example_path="app/components/static/example.html",
    ),
    Rule(
        name="nothing is loaded from another host",
        finder=matches(CDN),
        scope=tuple(f"app/**/*.{ending}" for ending in ("py", "js", "css", "html")),
        bad=(
            '<script src="https://example.org/a.js"></script>',
            "<link rel=stylesheet href=//example.org/a.css>",
            "@import url('https://example.org/font.css');",
            "src: url(https://example.org/font.woff2)",
            "import x from 'https://example.org/x.js'",
            "fetch('https://example.org/data')",
            "PLOTLY = 'https://cdn.plot.ly/plotly.js'",
            "figure.to_html(include_plotlyjs='cdn')",
        ),
        good=(
            '<a href="https://arxiv.org/abs/2412.14838">paper</a>',
            'const SVG = "http://www.w3.org/2000/svg";',
            "fetch('/gradio_api/file=plotly.js')",
            "url = 'http://127.0.0.1:7860'",
        ),
        example_path="app/components/static/example.js",
    ),
)


def is_public_name(name: str) -> bool:
    """Whether `dynamickv.member` is among what the engine's __init__ exports."""
    package, _, member = name.partition(".")
    if not member:
        return package == "dynamickv"
    exported = Source("dynamickv/__init__.py", (ROOT / "dynamickv/__init__.py").read_text("utf-8"))
    return member in {imported.rpartition(".")[2] for _, imported in exported.imports}


def label(rule: Rule) -> str:
    return rule.name.replace(" ", "-")


def snippets(kind: str) -> list[object]:
    return [
        pytest.param(rule, snippet, id=f"{label(rule)}-{number}")
        for rule in RULES
        for number, snippet in enumerate(getattr(rule, kind))
    ]


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_the_source_follows(rule: Rule) -> None:
    files = rule.files()
    assert files, f"nothing to check in {rule.scope}: has a folder moved?"
    found = [
        violation
        for path in files
        for violation in rule.violations(
            Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        )
    ]
    assert not found, "\n".join([rule.name, *found])


@pytest.mark.parametrize(("rule", "snippet"), snippets("bad"))
def test_the_rule_rejects(rule: Rule, snippet: str) -> None:
    assert rule.violations(Source(rule.example_path, snippet))


@pytest.mark.parametrize(("rule", "snippet"), snippets("good"))
def test_the_rule_accepts(rule: Rule, snippet: str) -> None:
    assert not rule.violations(Source(rule.example_path, snippet))


@pytest.mark.parametrize(
    ("path", "statement", "expected"),
    [
        ("app/views/a.py", "from ..theme import style", "app.theme.style"),
        ("app/views/__init__.py", "from . import budgets", "app.views.budgets"),
        ("dynamickv/a.py", "from .methods.base import Method", "dynamickv.methods.base.Method"),
        ("dynamickv/a.py", "import numpy as np", "numpy"),
    ],
)
def test_imports_are_resolved_to_dotted_names(path: str, statement: str, expected: str) -> None:
    assert [name for _, name in Source(path, statement).imports] == [expected]


# The engine's house: what tests/drawing.py computes from the imports.


def test_every_room_has_a_floor_and_every_floor_its_rooms() -> None:
    engine = ROOT / "dynamickv"
    rooms = {path.parent.name for path in engine.glob("*/*.py")}
    rooms |= {path.stem for path in engine.glob("*.py")} - {"__init__"}
    assert sorted(room for floor in FLOORS.values() for room in floor) == sorted(rooms)


def test_no_file_of_the_engine_reaches_itself_along_its_imports() -> None:
    circle = circle_in(imports_of_files(engine_sources()))
    assert not circle, "a circle of imports: " + " -> ".join(circle)


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("from dynamickv.reading.b import f", "from dynamickv.reading.a import g", True),
        ("from . import b", "def f():\n    from .a import g", True),
        ("from .b import f", "if TYPE_CHECKING:\n    from .a import g", False),
        ("from .b import f", "import numpy", False),
    ],
)
def test_a_circle_is_found_where_there_is_one(first: str, second: str, found: bool) -> None:
    sources = [Source("dynamickv/reading/a.py", first), Source("dynamickv/reading/b.py", second)]
    assert bool(circle_in(imports_of_files(sources))) == found


def test_the_drawing_shows_a_room_and_what_it_imports() -> None:
    sources = [
        Source("dynamickv/reading/a.py", "from dynamickv.cache import KVCache\nfrom . import b"),
        Source("dynamickv/reading/b.py", "from dynamickv.methods.full import FullKV"),
        Source("dynamickv/methods/full.py", "import torch"),
        Source("dynamickv/cache.py", "import torch"),
    ]
    lines = drawing_of(imports_of_files(sources)).splitlines()
    assert [line.split()[-4:] for line in lines if "reading" in line] == [
        ["reading/", "->", "methods/", "cache"]
    ]


def test_the_drawing_in_the_docs_is_what_the_engine_imports() -> None:
    _, shown, _ = between_the_marks(DRAWN_ON.read_text(encoding="utf-8"))
    assert shown == block(), (
        "docs/extending.md shows other imports than dynamickv/ has; "
        "`python -m tests.drawing --write` puts the measured ones there"
    )


def test_every_room_of_the_page_has_a_floor() -> None:
    page = ROOT / "app"
    rooms = {path.parent.name for path in page.glob("*/*.py")}
    rooms |= {path.stem for path in page.glob("*.py")} - {"__init__"}
    assert sorted(room for floor in PAGE_FLOORS for room in floor) == sorted(rooms)
