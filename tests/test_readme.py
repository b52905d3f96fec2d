"""README and docs/ say what is true: links lead somewhere, the tree exists, snippets run, tables
and versions follow the code and the results."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from app.views import View
from benchmarks import readme
from benchmarks.evidence import section as evidence_section
from dynamickv import METHODS, ScoredMethod, Trace
from dynamickv.records import LayerObservation

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "findings" / "README.md", *DOCS]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FRONT_MATTER = dict(
    line.split(": ", 1) for line in README.split("---")[1].splitlines() if ": " in line
)
LONGEST = 210


def section(text: str, title: str) -> str:
    """The text under a heading, up to the next one."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def tree_paths() -> list[str]:
    """Every file and folder of the annotated tree, from the root. A name ends where two spaces or
    a word that is no path begin; two spaces more are one folder deeper."""
    folders, paths = [""], []
    for line in section(EXTENDING, "Tree").split("```")[1].strip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"\s{2,}", line.strip())[0].split()
        folders = folders[: depth + 1]
        paths += [folders[-1] + name for name in names]
        if names[0].endswith("/"):
            folders.append(folders[-1] + names[0])
    return paths


def anchors(page: Path) -> set[str]:
    """Headings of a page as GitHub names them in links."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> list[str]:
    """Links of a page that stay in the repository."""
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8"))


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.S)


def around(text: str, fact: str) -> str:
    """A few sentences of a document, with a fact in them: what a test has time for."""
    at = text.index(fact)
    return text[max(at - 600, 0) : at + 600]


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert match, f"{package} is not pinned"
    return match.group(1)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_readme_is_short_enough_to_be_read_to_the_end() -> None:
    assert len(README.splitlines()) <= LONGEST


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_readme_leads_to_every_page(page: Path) -> None:
    assert f"docs/{page.name}" in links(ROOT / "README.md")


@pytest.mark.parametrize("path", tree_paths())
def test_the_tree_names_what_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("package", ["dynamickv", "app"])
def test_the_tree_names_every_folder_of(package: str) -> None:
    folders = {f"{name_of(path.parent)}/" for path in (ROOT / package).glob("*/__init__.py")}
    assert folders <= set(tree_paths())


def test_the_place_of_the_imports_drawing_is_marked() -> None:
    drawing = EXTENDING.split("<!-- imports:begin -->")[1].split("<!-- imports:end -->")[0]
    assert drawing.strip()


def test_the_tests_that_security_names_exist() -> None:
    rows = [line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if "|" in line]
    named = [name for row in rows for name in re.findall(r"\b(?:tests|app)/[\w./]+", row)]
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row(name: str) -> None:
    assert f"\n| `{name}` |" in section(README, "How it works")


def test_every_option_of_the_page_is_explained() -> None:
    options = re.findall(r'"(--[a-z-]+)"', (ROOT / "app.py").read_text("utf-8"))
    hosting = (ROOT / "docs" / "hosting.md").read_text("utf-8")
    assert options
    for option in options:
        assert f"`{option}" in section(hosting, "Options")


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=name_of(page)) for page in PAGES for code in snippets(page)]
)
def test_python_snippets_parse(code: str) -> None:
    compile(code, "snippet", "exec")


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("name", ["README.md", "docs/python.md", "docs/serving.md"])
def test_the_snippets_of_a_page_run_one_after_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Path("assets/examples/harbour-report.txt")
    (tmp_path / report).parent.mkdir(parents=True)
    (tmp_path / report).write_text(around((ROOT / report).read_text("utf-8"), "Heron Seven"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for code in snippets(ROOT / name):
        if "kvpress" not in code:  # it has an environment of its own
            exec(compile(code, name, "exec"), names)
    assert "Heron Seven" in capsys.readouterr().out


def test_the_method_of_the_recipe_keeps_its_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    code = snippets(ROOT / "docs" / "extending.md")[0]
    # A dataclass looks its module up, so it must be one.
    (tmp_path / "recipe_key_norm.py").write_text(code, "utf-8")
    method = importlib.import_module("recipe_key_norm").KeyNorm(capacity=12)
    monkeypatch.delitem(sys.modules, "recipe_key_norm")
    assert isinstance(method, ScoredMethod)
    layer = LayerObservation(
        queries=torch.randn(4, method.tail, 8), keys=torch.randn(2, 40, 8), scaling=1.0
    )
    assert method.score(layer).shape == (2, 40 - method.window_size)
    assert [len(head) for head in method.select([layer]).indices[0]] == [12, 12]


def test_the_view_of_the_recipe_draws_a_recorded_run() -> None:
    names: dict[str, object] = {}
    exec(snippets(ROOT / "docs" / "extending.md")[1], names)
    view = names["VIEW"]
    assert isinstance(view, View)
    trace = Trace.load(ROOT / "assets" / "runs" / "meeting.json.gz")
    assert len(view.render(trace).to_json()["data"][0]["x"]) == len(trace.runs)


def test_the_space_runs_the_pinned_gradio() -> None:
    assert FRONT_MATTER["sdk_version"] == pinned("gradio")


def test_the_space_has_what_its_front_matter_names() -> None:
    assert (ROOT / FRONT_MATTER["app_file"]).is_file()
    assert len(FRONT_MATTER["short_description"]) <= 60


def test_the_measured_tables_are_those_of_the_results() -> None:
    assert readme.measured_section() in readme.PAGE.read_text("utf-8")


def test_the_headlines_are_those_of_the_results() -> None:
    assert readme.headline_section() in README


def test_the_recorded_evidence_is_that_of_the_files() -> None:
    assert evidence_section() in readme.PAGE.read_text("utf-8")


ROW = {"measure": "decode", "value": 2.0, "unit": "x", "target": ">= 1.5", "note": ""}


def test_a_figure_to_be_measured_again_is_not_judged() -> None:
    assert readme.rows_with_targets([ROW], [])[1][-1] == "yes"
    assert readme.rows_with_targets([ROW], ["decode"])[1][-1] == "to be measured again"


def test_a_figure_shows_the_range_of_its_rounds_where_the_results_hold_it() -> None:
    assert readme.in_brackets(ROW) == "2 x"
    assert readme.in_brackets({**ROW, "minimum": 1.5, "maximum": 2.25}) == "2 x (1.5 to 2.25)"


def test_no_headline_waits_to_be_measured_again() -> None:
    for _, (name, measure) in readme.HEADLINE_ROWS:
        assert measure not in readme.results(name).get("again", [])


def test_a_page_without_its_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<a>\nold\n</a>\nafter\n", "utf-8")
    readme.put(page, "<a>\nnew\n</a>", ("<a>", "</a>"))
    assert page.read_text("utf-8") == "before\n<a>\nnew\n</a>\nafter\n"
    with pytest.raises(ValueError, match=r"page\.md has no <b>"):
        readme.put(page, "new", ("<b>", "</b>"))
