"""The layers of docs/structure.md, held against every import of the source tree.

Function-level and type-only imports count: both say what a reader has to know.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"llmfast": ROOT / "llmfast", "llmfast_kernels": ROOT / "kernels/llmfast_kernels"}
MAX_LINES = 450


def modules() -> dict[str, Path]:
    """Return every module of the source tree by its dotted name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield the modules of the tree that a module imports, wherever in the file it does so."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known:
                    yield inner
                elif source in known:
                    yield source


def layers() -> list[tuple[str, list[str]]]:
    """Return the rows of the table in docs/structure.md, top first: a layer's name and paths."""
    rows = []
    for line in (ROOT / "docs/structure.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        paths = re.findall(r"`([\w/.]+)`", cells[1]) if len(cells) == 4 else []
        if paths:
            rows.append((cells[0], paths))
    return rows


def rank_of(path: Path) -> tuple[int, str]:
    """Return a file's layer, 0 at the top: the one whose path is its longest prefix."""
    relative = path.relative_to(ROOT).as_posix()
    matches = [
        (len(prefix), rank, name)
        for rank, (name, prefixes) in enumerate(layers())
        for prefix in prefixes
        if relative == prefix or relative.startswith(prefix.rstrip("/") + "/")
    ]
    assert matches, f"{relative} belongs to no layer of docs/structure.md"
    _, rank, name = max(matches)
    return rank, name


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports_of(name, path, known)) - {name} for name, path in known.items()}


def test_imports_point_down(graph):
    known = modules()
    ranks = {name: rank_of(path) for name, path in known.items()}
    up = [
        f"{name} ({ranks[name][1]}) imports {other} ({ranks[other][1]})"
        for name, others in graph.items()
        for other in others
        if ranks[other][0] < ranks[name][0]
    ]
    assert not up, "\n".join(sorted(up))


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            component, stack[at:] = stack[at:], []
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_import_closes_a_circle(graph):
    assert not circles(graph)


def test_no_circle_between_rooms(graph):
    def room(name: str) -> str:
        """Return a module's folder in its package; a file in the package's root is a room."""
        package, _, rest = name.partition(".")
        is_folder = (SOURCES[package] / rest.partition(".")[0]).is_dir()
        return f"{package}.{rest.partition('.')[0]}" if rest and is_folder else name

    rooms: dict[str, set[str]] = {}
    for name, others in graph.items():
        own = rooms.setdefault(room(name), set())
        own |= {room(other) for other in others} - {room(name)}
    assert not circles(rooms)


def test_files_read_in_one_go():
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in modules().values()
        if (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


GPU_STATE = ("executor", "graphs", "cache", "resident", "results", "step_model", "block_model")


def test_one_module_of_the_engine_knows_the_executor(graph):
    knowing = {
        name
        for name, others in graph.items()
        for other in others
        if name.startswith("llmfast.engine.")
        and other.startswith("llmfast.runner.")
        and other.rpartition(".")[2] in GPU_STATE
    }
    assert knowing <= {"llmfast.engine.model_runner", "llmfast.engine.config"}  # config: BLOCK_SIZE
