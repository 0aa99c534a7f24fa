"""Rules of what may import what, over the sources below a folder. Each function returns what breaks its rule."""

from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from support.source_code import Import, imports, imports_in_strings, sources


def module_cycle(root: Path, *packages: str) -> list[str]:
    """Modules of which each imports the one before, the first and last the same; none if there is no such ring."""
    return _cycle(_graph(root, *packages))


def package_cycle(root: Path, *packages: str) -> list[str]:
    """The same for what lies directly in a package, these or one in them: sub-packages as wholes, and modules.

    A package's __init__.py stands for the package, and may import from all that is in it.
    """
    graph = _graph(root, *packages)
    for package in sorted({parent for module in graph for parent in _parents(module)}):
        rough: dict[str, set[str]] = {}
        for module, needs in graph.items():
            if part := _part(module, package):
                rough.setdefault(part, set()).update({_part(need, package) for need in needs} - {part, ""})
        if found := _cycle(rough):
            return found
    return []


def names_from_the_top(root: Path, package: str) -> list[str]:
    """Imports inside a package of what is no module, but a name that its own topmost __init__.py passes on."""
    modules = sources(root, package)
    return [
        f"{place} takes {found.name} from the top"
        for place, found in _all_imports(root, package)
        if found.package == package and _module(found.name, modules) == package
    ]


def imports_of(root: Path, *names: str, forbidden: Collection[str], when_loaded: bool = False) -> list[str]:
    """Imports of forbidden packages. when_loaded: those count alone that are made as the module is loaded."""
    return [
        f"{place} imports {found.name}"
        for place, found in _all_imports(root, *names)
        if found.package in forbidden and (found.when_loaded or not when_loaded)
    ]


def imports_beyond(root: Path, *names: str, allowed: Collection[str]) -> list[str]:
    """Imports of any package that is not allowed."""
    return [
        f"{place} imports {found.name}" for place, found in _all_imports(root, *names) if found.package not in allowed
    ]


def relative_imports(root: Path, *names: str) -> list[str]:
    """Imports by a name that begins with a dot."""
    return [f"{place} imports {found.name}" for place, found in _all_imports(root, *names) if not found.package]


def folders_without_init(root: Path, *packages: str) -> list[str]:
    """Folders of modules that are no packages: they would be left out where the packages are installed."""
    folders = {path.parent for path in sources(root, *packages).values()}
    return sorted(str(folder.relative_to(root)) for folder in folders if not (folder / "__init__.py").exists())


def imports_of_tests(root: Path, folder: str) -> list[str]:
    """Imports of a test file by whatever else lies in the folder, in programs for other processes, too."""
    modules = sources(root, folder)
    tests = {name for module in modules if (name := module.split(".")[-1]).startswith("test_")}
    return [
        f"{path.relative_to(root)}:{found.line} imports {found.name}"
        for path in modules.values()
        for found in imports(path) + imports_in_strings(path)
        if tests & set(found.name.split("."))
    ]


def _all_imports(root: Path, *names: str) -> Iterator[tuple[str, Import]]:
    for path in sources(root, *names).values():
        for found in imports(path):
            yield f"{path.relative_to(root)}:{found.line}", found


def _graph(root: Path, *packages: str) -> dict[str, set[str]]:
    """For each module, those of the same packages that it names in an import."""
    relative = relative_imports(root, *packages)
    assert not relative, f"whose names are not known here: {relative}"
    modules = sources(root, *packages)
    needs = {module: {_module(found.name, modules) for found in imports(path)} for module, path in modules.items()}
    return {module: found - {""} for module, found in needs.items()}


def _module(name: str, modules: Collection[str]) -> str:
    """The module that a name is of or in; "" if it is none of these."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def _parents(module: str) -> list[str]:
    """The packages that a module is in, and itself, which may be one."""
    parts = module.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _part(module: str, package: str) -> str:
    """What directly in the package a module belongs to; the package itself for its __init__.py; "" outside."""
    if module == package:
        return package
    return ".".join(module.split(".")[: package.count(".") + 2]) if module.startswith(f"{package}.") else ""


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []
