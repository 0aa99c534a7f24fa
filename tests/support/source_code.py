"""The sources of packages at any depth, and their imports as they are written: for tests of what imports what."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def sources(root: Path, *names: str) -> dict[str, Path]:
    """All files of the packages, folders and modules of these names, by dotted name; an __init__.py has its folder's.

    Raises AssertionError where one of them holds no file: a walk that sees nothing proves nothing.
    """
    found = {}
    for name in names:
        start = root.joinpath(*name.split("."))
        files = sorted(start.rglob("*.py")) if start.is_dir() else [start.with_suffix(".py")]
        assert files and all(file.is_file() for file in files), f"no source of {name} in {root}"
        for file in files:
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@dataclass(frozen=True)
class Import:
    """One name that a file imports: `import a.b` and `from a import b` both name a.b, `from . import b` names .b."""

    name: str
    line: int
    when_loaded: bool  # else inside a function, or for type checkers alone

    @property
    def package(self) -> str:
        """The first part of the name."""
        return self.name.split(".")[0]


def imports(path: Path) -> list[Import]:
    """All imports of a file, in functions and under TYPE_CHECKING, too."""
    return list(_imports(ast.parse(path.read_text(), str(path)), when_loaded=True))


def _imports(node: ast.AST, *, when_loaded: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, when_loaded) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (f"{node.module}." if node.module else "")
        yield from (Import(base + alias.name, node.lineno, when_loaded) for alias in node.names)
    deferred: list[ast.AST] = []
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        deferred = list(node.body)
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        deferred = list(node.body)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, when_loaded=when_loaded and child not in deferred)


def imports_in_strings(path: Path) -> list[Import]:
    """Those that begin a line of a string, as in a program for another process."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"^\s*(?:from|import) +([\w.]+)", node.value, flags=re.MULTILINE)
            found += [Import(name, node.lineno, when_loaded=False) for name in names]
    return found
