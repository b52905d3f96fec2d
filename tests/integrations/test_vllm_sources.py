"""What the plugin takes from vLLM is in the sources of another version, too, which need not run
here: in vLLM's environment (make vllm)

VLLM_SOURCES=vllm-0.33.0 .venv-vllm/bin/python -m pytest tests/integrations/test_vllm_sources.py

Without VLLM_SOURCES it is the installed version that is looked at.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM pins its own torch; run make vllm")

from dynamickv.integrations.vllm import cache_layout, compat, connector, cpu, metrics, steps

INSTALLED = Path(vllm.__file__).parents[1]
SOURCES = Path(os.environ.get("VLLM_SOURCES", INSTALLED))
OURS = [
    kind
    for module in (cache_layout, connector, cpu, metrics, steps)
    for kind in vars(module).values()
    if isinstance(kind, type) and kind.__module__ == module.__name__
]


def parsed(root: Path, module: str) -> ast.Module:
    """A module's source, not imported."""
    path = root / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))


def names_in(tree: ast.Module) -> set[str]:
    """What a module defines, imports, or looks up by name when asked."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def arguments_of(root: Path, kind: type, method: str) -> str:
    """The arguments of a class's own method as its source has them; nothing if there is none."""
    for node in ast.walk(parsed(root, kind.__module__)):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == method:
                    return ast.unparse(part.args)
    return ""


def overridden() -> set[tuple[type, str]]:
    """Methods of vLLM's that the plugin's classes have in their place."""
    found = set()
    for ours in OURS:
        for name in dir(ours):
            owners = [kind for kind in ours.__mro__ if name in vars(kind)]
            if owners[0].__module__.startswith("dynamickv.") and not name.startswith("__"):
                found |= {(k, name) for k in owners[1:] if k.__module__.startswith("vllm.")}
    return found


@pytest.mark.parametrize("name", compat.NAMES)
def test_a_name_taken_from_vllm_is_in_its_sources(name):
    assert name in names_in(parsed(SOURCES, compat.NAMES[name]))


@pytest.mark.parametrize(
    ("kind", "method"),
    sorted(overridden(), key=lambda one: (one[0].__name__, one[1])),
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_a_method_that_the_plugin_overrides_takes_the_same_arguments(kind, method):
    ours = arguments_of(INSTALLED, kind, method)
    assert ours
    assert arguments_of(SOURCES, kind, method) == ours
