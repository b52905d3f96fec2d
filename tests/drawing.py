"""The engine's floors, and its imports as a drawing: `python -m tests.drawing` prints the block
that docs/extending.md shows, with --write it puts it there.

A room is a folder or a file of dynamickv/. What counts is what is imported when the program runs,
be it inside a function; imports under `if TYPE_CHECKING:` are for types only. The engine's
`__init__.py` is the sign at the door: it names what is public, and no room imports it.
"""

from __future__ import annotations

import graphlib
import sys
from collections.abc import Iterator, Mapping, Sequence

from tests.source import ROOT, Source

ENGINE = "dynamickv"
FLOORS: dict[str, tuple[str, ...]] = {
    "command line": ("__main__", "cli"),
    "measuring": ("evaluate",),
    "flows": ("serve", "conversation", "smallest", "compare", "answer", "walk"),
    "other engines": ("integrations",),
    "token by token": ("decoding",),
    "a model": ("models",),
    "a prompt": ("reading",),
    "what to keep": ("methods",),
    "what happened": ("record",),
    "ground floor": (
        "cache",
        "layers",
        "records",
        "scoring",
        "fast",
        "memory",
        "neighbours",
        "threads",
        "transfer",
        "version",
    ),
}
"""From the top down. A room may import from itself, its own floor and the floors below."""

PLACE = {room: place for place, rooms in enumerate(FLOORS.values()) for room in rooms}
"""How many floors are above a room's."""
PAGE = ROOT / "docs/extending.md"
BEGIN, END = "<!-- imports:begin -->", "<!-- imports:end -->"

Graph = dict[str, set[str]]
"""What each file or room imports."""


def room_of(name: str) -> str:
    """`reading` of dynamickv/reading/store.py and of dynamickv.reading.store; empty for the engine
    itself and for what lies outside."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[1] if parts[0] == ENGINE and len(parts) > 1 and parts[1] != "__init__" else ""


def upward_imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) of imports that do not run downwards."""
    room = room_of(source.path)
    if room not in PLACE:
        yield 1, f"{room} has no floor; give it one in tests/drawing.py"
        return
    for line, name in source.runtime_imports:
        if name.partition(".")[0] != ENGINE:
            continue
        other = room_of(name)
        if other not in PLACE:
            yield line, f"imports {name} from the engine's front door; import from its room"
        elif PLACE[other] < PLACE[room]:
            yield line, f"imports {name} from a floor above"


def imports_of_files(sources: Sequence[Source]) -> Graph:
    """By path; the front door left out."""
    files = {source.path for source in sources if room_of(source.path)}
    graph: Graph = {path: set() for path in sorted(files)}
    for source in sources:
        if source.path not in files:
            continue
        found = {file_of(name, files) for _, name in source.runtime_imports}
        graph[source.path] = {path for path in found if path and path != source.path}
    return graph


def file_of(name: str, files: set[str]) -> str:
    """The file that `dynamickv.reading.store.PrefillStore` comes from; empty for none of these."""
    while name:
        path = name.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py"):
            if candidate in files:
                return candidate
        name = name.rpartition(".")[0]
    return ""


def circle_in(graph: Mapping[str, set[str]]) -> list[str]:
    """A way from a file back to itself along its imports; empty where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        way: list[str] = error.args[1]
        return way[::-1]
    return []


def drawing_of(graph: Mapping[str, set[str]]) -> str:
    """The floors as text, a line a room, with what it imports."""
    rooms: Graph = {}
    folders = {room_of(path) for path in graph if path.count("/") > 1}
    for path, imported in graph.items():
        room = room_of(path)
        others = {room_of(other) for other in imported} - {room}
        rooms[room] = rooms.get(room, set()) | others

    def shown(room: str) -> str:
        return f"{room}/" if room in folders else room

    wide = max(map(len, FLOORS))
    lines = []
    for floor, members in FLOORS.items():
        for place, room in enumerate(members):
            title = floor if place == 0 else ""
            below = sorted(rooms.get(room, ()), key=list(PLACE).index)
            arrow = f" -> {'  '.join(map(shown, below))}" if below else ""
            lines.append(f"{title:<{wide}}  {shown(room):<13}{arrow}".rstrip())
    return "\n".join(lines)


def engine_sources() -> list[Source]:
    return [Source.read(path) for path in sorted((ROOT / ENGINE).glob("**/*.py"))]


def block() -> str:
    """What stands in docs/extending.md, marks included."""
    drawing = drawing_of(imports_of_files(engine_sources()))
    return f"{BEGIN}\n```text\n{drawing}\n```\n{END}"


def between_the_marks(page: str) -> tuple[str, str, str]:
    """A page's text before the block, the block with its marks, and what follows.

    Raises:
        ValueError: the page has not one of each mark.
    """
    if not page.count(BEGIN) == page.count(END) == 1:
        raise ValueError(f"{PAGE} needs one {BEGIN} and one {END}")
    start, end = page.index(BEGIN), page.index(END) + len(END)
    return page[:start], page[start:end], page[end:]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        before, _, after = between_the_marks(PAGE.read_text("utf-8"))
        PAGE.write_text(before + block() + after, "utf-8")
    else:
        print(block())
