"""The record names the engine's commit in a checkout, and says nothing of it elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dynamickv as dkv
from dynamickv import version
from dynamickv.evaluate import circumstances
from dynamickv.version import OLDEST_TRANSFORMERS
from tests.engine.tiny import DOCUMENT, QUESTION, tiny_llm

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


def checkout(folder: Path, files: dict[str, str]) -> Path:
    """A folder with git's files of that content, and nothing else."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


PACKED = f"""# pack-refs with: peeled fully-peeled sorted
{OTHER} refs/heads/mai
{COMMIT} refs/heads/main
^{OTHER}
"""


@pytest.mark.parametrize(
    ("files", "commit"),
    [
        ({".git/HEAD": f"{COMMIT}\n"}, COMMIT),
        ({".git/HEAD": "ref: refs/heads/main\n", ".git/refs/heads/main": f"{COMMIT}\n"}, COMMIT),
        ({".git/HEAD": "ref: refs/heads/main\n", ".git/packed-refs": PACKED}, COMMIT),
        (
            {
                ".git": "gitdir: main/.git/worktrees/here\n",
                "main/.git/worktrees/here/HEAD": "ref: refs/heads/main\n",
                "main/.git/worktrees/here/commondir": "../..\n",
                "main/.git/refs/heads/main": f"{COMMIT}\n",
            },
            COMMIT,
        ),
        ({".git/HEAD": f"{COMMIT}{COMMIT[:24]}\n"}, COMMIT + COMMIT[:24]),
        ({}, None),
        ({".git/HEAD": "ref: refs/heads/main\n"}, None),
        ({".git/HEAD": "ref: refs/heads/main\n", ".git/packed-refs": "# none\n"}, None),
        ({".git/HEAD": "/home/somebody/secret\n"}, None),
        ({".git/HEAD": "ref: ../../secret\n", "secret": "/home/somebody\n"}, None),
        ({".git": "nothing that git writes\n"}, None),
        ({".git/HEAD": ""}, None),
    ],
    ids=[
        "detached",
        "branch",
        "packed",
        "worktree",
        "sha256",
        "installed",
        "no commit yet",
        "not packed",
        "a path",
        "a ref outside",
        "no git folder",
        "empty",
    ],
)
def test_the_commit_is_read_from_git_s_files(
    tmp_path: Path, files: dict[str, str], commit: str | None
) -> None:
    assert version.checked_out(checkout(tmp_path, files)) == commit


def test_bytes_that_are_no_text_name_no_commit(tmp_path: Path) -> None:
    (checkout(tmp_path, {".git/x": ""}) / ".git" / "HEAD").write_bytes(b"\xff\xfe\x00")
    assert version.checked_out(tmp_path) is None


@pytest.mark.parametrize("commit", [COMMIT, None])
def test_records_hold_it_where_it_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commit: str | None
) -> None:
    monkeypatch.setattr(version, "_AT_START", commit)
    llm = tiny_llm()
    trace = dkv.compare(llm, DOCUMENT, QUESTION, methods=[dkv.FullKV()], max_new_tokens=1)
    trace.save(tmp_path / "run.json")
    assert dkv.Trace.load(tmp_path / "run.json").versions.get("commit") == commit
    assert trace.versions["dynamickv"] == circumstances(llm)["dynamickv"] == dkv.__version__
    assert circumstances(llm).get("commit") == commit


def test_methods_work_beside_a_transformers_that_is_too_old_for_models() -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "true = metadata.version\n"
        "metadata.version = lambda name: '5.2.0' if name == 'transformers' else true(name)\n"
        "import sys, torch, dynamickv as dkv\n"
        "keys = [torch.randn(1, 2, 64, 8)] * 3\n"
        "kept = dkv.retain(dkv.SnapKV(capacity=24), keys, keys)\n"
        "assert kept.indices[0].shape == (2, 24)\n"
        "assert 'transformers' not in sys.modules\n"
        "try: dkv.compare\n"
        "except ImportError as error: print(error)\n"
        "print(hasattr(dkv, 'nonsense'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        "dynamickv.compare needs transformers 5.17 or newer: pip install --upgrade transformers\n"
        "False\n"
    ), done.stderr


def test_the_oldest_transformers_is_the_one_that_is_installed_at_least() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8")
    assert f'"transformers>={".".join(map(str, OLDEST_TRANSFORMERS))},<6"' in project
