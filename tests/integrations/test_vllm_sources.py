"""What the plugin takes from vLLM is in the sources of another version, too, which need not run
here: in vLLM's environment (make vllm)

VLLM_SOURCES=vllm-0.33.0 .venv-vllm/bin/python -m pytest tests/integrations/test_vllm_sources.py

Without VLLM_SOURCES it is the installed version that is looked at.
"""

from __future__ import annotations

import ast
import importlib
import os
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM pins its own torch; run make vllm")

import vllm

from dynamickv.integrations import vllm as plugin
from dynamickv.integrations.vllm import compat

INSTALLED = Path(vllm.__file__).parents[1]
SOURCES = Path(os.environ.get("VLLM_SOURCES", INSTALLED))
EXTENDING = ("cache_layout", "connector", "cpu", "metrics", "steps")
"""The plugin's modules with classes that extend vLLM's."""


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


def arguments_of(root: Path, kind: type, method: str) -> str | None:
    """The arguments of a class's own method as its source has them; None if there is none."""
    for node in ast.walk(parsed(root, kind.__module__)):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == method:
                    return ast.unparse(part.args)
    return None


def overridden() -> set[tuple[type, str]]:
    """Methods of vLLM's that the plugin's classes have in their place."""
    # The connector can be imported only where the plugin is announced.
    plugin.register()
    found = set()
    for name in EXTENDING:
        module = importlib.import_module(f"{plugin.__name__}.{name}")
        for ours in (kind for kind in vars(module).values() if isinstance(kind, type)):
            found |= overridden_by(ours) if ours.__module__ == module.__name__ else set()
    return found


def overridden_by(ours: type) -> set[tuple[type, str]]:
    """Methods of vLLM's that one class has in their place."""
    found = set()
    for name in dir(ours):
        first, *rest = [kind for kind in ours.__mro__ if name in vars(kind)]
        if first.__module__.startswith(plugin.__name__) and not name.startswith("_"):
            found |= {(kind, name) for kind in rest if kind.__module__.startswith("vllm.")}
    return found


@pytest.mark.parametrize("name", compat.NAMES)
def test_a_name_taken_from_vllm_is_in_its_sources(name):
    assert name in names_in(parsed(SOURCES, compat.NAMES[name]))


def test_methods_that_the_plugin_overrides_take_the_same_arguments():
    methods = sorted(overridden(), key=lambda one: (one[0].__name__, one[1]))
    assert len(methods) > 20
    for kind, method in methods:
        expected = arguments_of(INSTALLED, kind, method)
        assert expected is not None, f"{kind.__name__}.{method}"
        assert arguments_of(SOURCES, kind, method) == expected, f"{kind.__name__}.{method}"
