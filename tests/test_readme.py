"""README says what is true: its tree exists, its snippets parse, its table and versions follow the
code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.evidence import section as evidence_section
from benchmarks.readme import section as measured_section
from dynamickv import METHODS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRONT_MATTER = dict(
    line.split(": ", 1) for line in README.split("---")[1].splitlines() if ": " in line
)


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def tree_paths() -> list[str]:
    """Every file and folder of the annotated tree, from the root."""
    folder, paths = "", []
    for line in section("Tree").split("```")[1].splitlines():
        names = [name for name in re.split(r"\s{2,}", line.strip())[0].split() if name]
        folder = folder if line.startswith(" ") else ""
        paths += [folder + name for name in names]
        if not line.startswith(" ") and names and names[0].endswith("/"):
            folder = names[0]
    return paths


def pinned(package: str) -> str:
    match = re.search(rf"^{package}==(\S+)", (ROOT / "requirements.txt").read_text(), re.M)
    assert match, f"{package} is not pinned"
    return match.group(1)


@pytest.mark.parametrize("path", tree_paths())
def test_the_tree_names_what_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_row(name: str) -> None:
    assert f"\n| `{name}` |" in section("How it works")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_python_snippets_parse(code: str) -> None:
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_local_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()


def test_the_space_runs_the_pinned_gradio() -> None:
    assert FRONT_MATTER["sdk_version"] == pinned("gradio")


def test_the_space_has_what_its_front_matter_names() -> None:
    assert (ROOT / FRONT_MATTER["app_file"]).is_file()
    assert len(FRONT_MATTER["short_description"]) <= 60


def test_the_measured_tables_are_those_of_the_results() -> None:
    assert measured_section() in README


def test_the_recorded_evidence_is_that_of_the_files() -> None:
    assert evidence_section() in README
