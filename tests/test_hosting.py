"""What hosts read: the Space's front matter, the Dockerfile, the size of files, the pins."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import dynamickv as dkv

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
FRONT_MATTER: dict[str, Any] = yaml.safe_load(README.split("---\n")[1])
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
HARDWARE = {
    *("cpu-basic", "cpu-upgrade", "zero-a10g", "t4-small", "t4-medium", "l4x1", "l4x4"),
    *("a10g-small", "a10g-large", "a10g-largex2", "a10g-largex4", "a100-large"),
}
# Every key that the hub documents (Spaces Configuration Reference), and what it takes.
KEYS: dict[str, Any] = {
    "title": lambda v: isinstance(v, str) and 0 < len(v) <= 60,
    "emoji": lambda v: isinstance(v, str) and not v.isascii(),
    "colorFrom": COLOURS.__contains__,
    "colorTo": COLOURS.__contains__,
    "sdk": {"gradio", "docker", "static"}.__contains__,
    "sdk_version": lambda v: re.fullmatch(r"\d+\.\d+\.\d+", str(v)),
    "python_version": lambda v: isinstance(v, str) and re.fullmatch(r"3\.\d+(\.\d+)?", v),
    "app_file": lambda v: (ROOT / v).is_file(),
    "app_port": lambda v: isinstance(v, int),
    "base_path": lambda v: isinstance(v, str),
    "app_build_command": lambda v: isinstance(v, str),
    "short_description": lambda v: isinstance(v, str) and 0 < len(v) <= 60,
    "license": lambda v: v == "apache-2.0",
    "pinned": lambda v: isinstance(v, bool),
    "fullWidth": lambda v: isinstance(v, bool),
    "header": {"mini", "default"}.__contains__,
    "suggested_hardware": HARDWARE.__contains__,
    "startup_duration_timeout": lambda v: re.fullmatch(r"\d+(s|m|h)", str(v)),
    "thumbnail": lambda v: isinstance(v, str),
    "models": lambda v: all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in v),
    "datasets": lambda v: all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in v),
    "tags": lambda v: all(re.fullmatch(r"[a-z0-9-]+", tag) for tag in v),
    "preload_from_hub": lambda v: all(re.match(r"[\w.-]+/[\w.-]+( \S+){0,2}$", line) for line in v),
    "hf_oauth": lambda v: isinstance(v, bool),
    "disable_embedding": lambda v: isinstance(v, bool),
    "custom_headers": lambda v: isinstance(v, dict),
}
NEEDED = [
    "title",
    "emoji",
    "sdk",
    "sdk_version",
    "python_version",
    "app_file",
    "license",
    "preload_from_hub",
]


def problems(matter: dict[str, Any]) -> list[str]:
    """Keys that are unknown, missing or have a value that the hub would not take."""
    unknown = [key for key in matter if key not in KEYS]
    missing = [key for key in NEEDED if key not in matter]
    return unknown + missing + [key for key in matter if key in KEYS and not KEYS[key](matter[key])]


def test_the_front_matter_has_only_documented_keys_with_values_they_take() -> None:
    assert problems(FRONT_MATTER) == []


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "blue"},
        {"colorFrom": "orange"},
        {"python_version": 3.12},
        {"app_file": "nowhere.py"},
        {"short_description": "x" * 61},
        {"header": "none"},
        {"suggested_hardware": "h100"},
        {"preload_from_hub": ["SmolLM2"]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_wrong_front_matter_is_noticed(change: dict[str, Any]) -> None:
    assert problems(FRONT_MATTER | change) == list(change)


def test_a_space_gets_the_pinned_default_model_before_it_starts() -> None:
    known = dkv.KNOWN_MODELS[dkv.DEFAULT_MODEL]
    (line,) = FRONT_MATTER["preload_from_hub"]
    repository, files, revision = line.split(" ")
    assert (repository, revision) == (known.hub_id, known.revision)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files.split(","))
    assert FRONT_MATTER["models"] == [known.hub_id]


def test_the_python_version_is_one_that_zero_gpu_has() -> None:
    assert FRONT_MATTER["python_version"] in ("3.12.12", "3.10.13")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_no_file_needs_git_lfs() -> None:
    """The hub refuses files above 10 MiB that are not in LFS."""
    sizes = {path.name: path.stat().st_size for path in tracked() if path.is_file()}
    assert len(sizes) > 100
    assert {name: size for name, size in sizes.items() if size > 10 * 2**20} == {}


def requirements() -> list[Requirement]:
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned_but_those_that_hosts_bring() -> None:
    loose = {r.name for r in requirements() if {part.operator for part in r.specifier} != {"=="}}
    assert loose == {"numpy", "huggingface_hub", "torch"}


@pytest.mark.parametrize("version", ["2.8.0", "2.9.1", "2.10.0", "2.11.0"])
def test_zero_gpu_s_torch_is_allowed(version: str) -> None:
    (torch,) = [r for r in requirements() if r.name == "torch"]
    assert torch.specifier.contains(version)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_has_exactly_one_version_of_each(python: str) -> None:
    names = [
        r.name
        for r in requirements()
        if r.marker is None or r.marker.evaluate({"python_version": python})
    ]
    assert len(names) == len(set(names))
    assert {"gradio", "transformers", "filelock", "psutil", "torch"} <= set(names)


def test_what_is_pinned_for_every_python_runs_on_the_oldest() -> None:
    needs = {
        r.name: metadata(r.name).get("Requires-Python") or ""
        for r in requirements()
        if r.marker is None and "==" in str(r.specifier)
    }
    assert {"gradio", "accelerate"} <= set(needs)
    assert [name for name, wanted in needs.items() if "3.10.13" not in SpecifierSet(wanted)] == []


def test_the_versions_with_known_holes_are_excluded() -> None:
    """CVE-2026-4372 (transformers below 5.3), CVE-2025-32434 (torch below 2.6), gradio's below 6.31
    (CVE-2026-111497)."""
    for name, hole in (("transformers", "<5.3"), ("torch", "<2.6"), ("gradio", "<6.31")):
        for requirement in (r for r in requirements() if r.name == name):
            low = min(part.version for part in requirement.specifier)
            assert low not in SpecifierSet(hole)


# Docker. hadolint is no Python package; these are the rules of it that matter here.

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
STEPS = [
    line.split(None, 1)
    for line in re.sub(r"\\\n", " ", DOCKERFILE).splitlines()
    if line.strip() and not line.startswith("#")
]


def of(instruction: str) -> list[str]:
    return [rest for name, rest in STEPS if name == instruction]


def test_the_image_is_small_pinned_and_not_run_as_root() -> None:
    (base,) = of("FROM")
    assert re.fullmatch(r"python:3\.12-slim-\w+", base)
    order = [name for name, _ in STEPS]
    assert order.index("USER") < order.index("CMD")
    assert of("USER") == ["explorer"]
    assert "latest" not in DOCKERFILE
    assert "ADD" not in order
    assert "sudo" not in DOCKERFILE
    assert "--no-deps -r requirements-embedded.txt" in DOCKERFILE


def test_the_image_is_listened_to_and_watched() -> None:
    (command,) = of("CMD")
    assert yaml.safe_load(command) == ["python", "app.py", "--host", "0.0.0.0"]
    assert of("EXPOSE") == ["7860"]
    assert "/health" in of("HEALTHCHECK")[0]


def test_what_the_image_copies_exists_and_is_let_in() -> None:
    let_in = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.M))
    copied = [
        name for step in of("COPY") for name in step.replace("--chown=explorer ", "").split()[:-1]
    ]
    assert set(copied) == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_a_port_in_use_is_said_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "app.py", "--port", str(port), "--model", "none"],
            capture_output=True, text=True, timeout=120, cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: port {port} is in use; choose another with --port\n"
