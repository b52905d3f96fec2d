"""The versions that are promised are the versions that are tested."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


def promised() -> dict[str, Version]:
    """Oldest version of each of the engine's dependencies, from pyproject.toml."""
    listed = (ROOT / "pyproject.toml").read_text("utf-8").partition("\ndependencies = [")[2]
    floors = {}
    for text in re.findall(r'^    "(.*)",$', listed.partition("\n]")[0], re.M):
        requirement = Requirement(text)
        (floor,) = (part.version for part in requirement.specifier if part.operator == ">=")
        floors[requirement.name] = Version(floor)
    return floors


def test_make_oldest_installs_the_oldest_versions_promised() -> None:
    lines = (ROOT / "requirements-oldest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    del pinned["pytest"]
    versions = re.search(r"^OLDEST_TORCH := (.+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert versions
    pinned["torch"] = min(versions[1].split(), key=Version)
    assert {name: Version(version) for name, version in pinned.items()} == promised()


def set_in(file: str, pattern: str) -> str:
    """The one value that a file sets."""
    (value,) = re.findall(pattern, (ROOT / file).read_text("utf-8"), re.M)
    return str(value)


def test_the_recorded_torch_is_installed_everywhere_and_allowed() -> None:
    recorded = set_in("Makefile", r"^TORCH +\?= (.+)$")
    assert set_in("Dockerfile", r"^ARG TORCH=(.+)$") == recorded
    allowed = Requirement(set_in("requirements.txt", r"^(torch.+)$"))
    assert allowed.specifier.contains(recorded)
    runs = sorted((ROOT / "assets" / "runs").glob("*.json.gz"))
    assert runs
    for path in runs:
        made_with = json.loads(gzip.decompress(path.read_bytes()))["versions"]["torch"]
        assert Version(made_with).base_version == recorded, path.name
