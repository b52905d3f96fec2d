"""Where vLLM would run uncompressed, or not as it was tried, the documented command fails in one
sentence. Runs where vLLM is installed (make vllm)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM pins its own torch; run make vllm")

from benchmarks.vllm_run import write_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with random weights."""
    folder = str(tmp_path_factory.mktemp("tiny"))
    write_tiny_model(folder, num_layers=1)
    return folder


def documented_command(folder: str) -> list[str]:
    """As in docs/vllm.md, with the server behind `vllm serve`; the model has no tokenizer."""
    page = (ROOT / "docs" / "vllm.md").read_text("utf-8")
    (transfer,) = re.findall(r"--kv-transfer-config '(\{.*?\})'\n", page)
    (flags,) = re.findall(r"vllm serve MODEL (.*?) \\\n", page)
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    return [*server, *flags.split(), "--kv-transfer-config", transfer, "--skip-tokenizer-init"]


def failure(folder: str, path: str = str(ROOT), **environment: str) -> str:
    """What the documented command says when it ends, which it must. Not in the repository's folder,
    from which Python would import before it looks at `path`."""
    ended = subprocess.run(
        documented_command(folder),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=280,
        check=False,
    )
    assert ended.returncode != 0
    return ended.stdout


def test_a_mistyped_plugin_name_fails_in_one_sentence(folder):
    said = failure(folder, VLLM_PLUGINS="dynamickvv")
    sentence = (
        "--kv-transfer-config asks for DynamicKV, and VLLM_PLUGINS=dynamickvv did not load the "
        "plugin; set VLLM_PLUGINS=dynamickv"
    )
    assert sentence in said


def test_a_package_that_cannot_be_imported_fails_with_its_reason(folder, tmp_path):
    package = tmp_path / "dynamickv"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('transformers is too old')\n")
    said = failure(folder, path=str(tmp_path), VLLM_PLUGINS="dynamickv")
    assert said.strip().splitlines()[-1] == "ImportError: transformers is too old"


def test_another_version_of_vllm_fails_in_one_sentence(folder, tmp_path):
    """Said by the plugin when vLLM loads it."""
    (tmp_path / "sitecustomize.py").write_text("import vllm\nvllm.__version__ = '0.31.0+cpu'\n")
    said = failure(folder, path=f"{tmp_path}:{ROOT}", VLLM_PLUGINS="dynamickv")
    assert said.strip().splitlines()[-1] == (
        "ValueError: the DynamicKV plugin was tested with vLLM 0.32.0 and this is 0.31.0; install "
        "a tested version or take dynamickv out of VLLM_PLUGINS"
    )
