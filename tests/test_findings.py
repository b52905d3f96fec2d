"""findings/: what can be said of the scripts without running them, which takes a network."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
GOOD = "#!/usr/bin/env bash\nset -e\npip install --quiet tqdm==4.67.1 'six==1.17.0'\n"
# A path that begins at the root, but for what every system has.
MACHINE_PATH = re.compile(r"(?<![\w.$}/:])/(?!usr/bin/env\b|dev/null\b)[A-Za-z]\w*/[\w./-]+")


def problems(text: str) -> list[str]:
    """What breaks the form in a script's text."""
    installs = re.findall(r"pip install(.*)", text.replace("\\\n", " "))
    packages = [
        word.strip("\"'")
        for line in installs
        for word in re.split(r"[;&|]", line)[0].split()
        if not word.startswith("-")
    ]
    found = [f"{package} is not pinned" for package in packages if "==" not in package]
    found += [] if packages else ["installs nothing"]
    found += ["names the product"] if re.search("dynamic.?kv", text, re.I) else []
    found += [f"names {path}" for path in MACHINE_PATH.findall(text)]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_finding_pins_public_packages_and_names_neither_product_nor_machine(script: Path) -> None:
    assert problems(script.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace("==4.67.1", ""),
        GOOD.replace("'six==1.17.0'", "'six>=1.17'"),
        GOOD.replace("pip install", "echo"),
        GOOD + "python -c 'import dynamickv'\n",
        GOOD + "# seen with DynamicKV\n",
        GOOD + "cd /home/someone/project\n",
        GOOD + "cat '/opt/data/file.txt'\n",
        GOOD + "echo >/tmp/seen.txt\n",
    ],
)
def test_a_script_out_of_form_is_noticed(text: str) -> None:
    assert problems(GOOD) == []
    assert problems(text) != []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_finding_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text("utf-8").startswith("#!/usr/bin/env ")


def test_the_table_names_every_script_and_its_versions() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (FOLDER / "README.md").read_text("utf-8").splitlines()
        if line.startswith("| [")
    ]
    assert SCRIPTS
    assert [row[0] for row in rows] == [f"[{path.name}]({path.name})" for path in SCRIPTS]
    for _, subject, versions in rows:
        assert subject
        assert re.search(r"\d+\.\d+", versions)
