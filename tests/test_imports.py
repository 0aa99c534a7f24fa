"""The direction of the imports: torchrun_main -> peft_pretraining -> qgalore -> torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import ROOT

OPTIONAL = ("wandb", "datasets", "pyarrow", "peft")
OURS = ("torchrun_main", "peft_pretraining", "qgalore")


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """The first parts of the names of all modules that a file imports."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "qgalore").glob("*.py")), ids=lambda path: path.name)
def test_qgalore_needs_torch_alone(path):
    assert imported(path) - set(sys.stdlib_module_names) <= {"torch", "qgalore"}


@pytest.mark.parametrize("path", sorted((ROOT / "peft_pretraining").glob("*.py")), ids=lambda path: path.name)
def test_peft_pretraining_knows_qgalore_but_not_the_script(path):
    assert "torchrun_main" not in imported(path)


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("peft_pretraining/*.py")) + [ROOT / "torchrun_main.py"], ids=lambda path: path.name
)
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not imported(path, top_level_only=True) & set(OPTIONAL)


def _internal(module: str, *, package: str) -> set[str]:
    tree = ast.parse((ROOT / package / f"{module}.py").read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {node.module.split(".")[1] for node in nodes if (node.module or "").startswith(f"{package}.")}


@pytest.mark.parametrize("package", ["qgalore", "peft_pretraining"])
def test_no_module_imports_itself_round_a_corner(package):
    """Within a package, too, the arrows point one way: no cycles."""
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
    waiting = {module: _internal(module, package=package) & modules for module in modules}
    while waiting:
        free = {module for module, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"these import each other: {sorted(waiting)}"
        waiting = {module: needs for module, needs in waiting.items() if module not in free}


def test_importing_touches_no_gpu_and_nothing_optional():
    """Importing the whole program leaves CUDA alone and loads neither wandb, datasets nor peft."""
    code = (
        "import sys, torchrun_main, torch; "
        "assert not torch.cuda.is_initialized(); "
        f"loaded = [name for name in {OPTIONAL} if name in sys.modules]; "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
