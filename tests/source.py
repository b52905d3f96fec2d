"""A source file as the rules see it: its syntax, its calls and what it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Source:
    """A file: its path from the repository's root, and its text."""

    path: str
    text: str

    @classmethod
    def read(cls, path: Path) -> Source:
        return cls(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text, self.path)))

    @cached_property
    def calls(self) -> list[ast.Call]:
        return [node for node in self.nodes if isinstance(node, ast.Call)]

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, dotted name) of everything imported; `from a import b` counts as `a.b`."""
        return [*self._statements(self.nodes), *self._import_calls()]

    @cached_property
    def runtime_imports(self) -> list[tuple[int, str]]:
        """Of these, what is imported when the program runs, be it inside a function. What stands
        under `if TYPE_CHECKING:` names types for a reader and a type checker only."""
        for_types = {
            inner
            for node in self.nodes
            if isinstance(node, ast.If) and dotted(node.test).endswith("TYPE_CHECKING")
            for statement in node.body
            for inner in ast.walk(statement)
        }
        at_runtime = [node for node in self.nodes if node not in for_types]
        return [*self._statements(at_runtime), *self._import_calls()]

    def _statements(self, nodes: list[ast.AST]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = ".".join(filter(None, [self._package(node.level), node.module]))
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def _import_calls(self) -> Iterator[tuple[int, str]]:
        for call in self.calls:
            names = [arg.value for arg in call.args[:1] if isinstance(arg, ast.Constant)]
            if names and dotted(call.func).endswith(("import_module", "__import__")):
                yield call.lineno, str(names[0])

    def _package(self, level: int) -> str:
        """What the dots of a relative import stand for; empty for an absolute one."""
        parts = PurePosixPath(self.path).parts
        return ".".join(parts[: len(parts) - level]) if level else ""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""
