"""The direction of the imports: torchrun_main -> peft_pretraining -> qgalore -> torch, and no rings among them."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import import_rules
from support.runs import ROOT
from support.source_code import imports, sources

OPTIONAL = ("wandb", "datasets", "pyarrow", "peft")
PACKAGES = ("qgalore", "peft_pretraining")
PROGRAM = (*PACKAGES, "torchrun_main", "benchmarks")
CORE = {*sys.stdlib_module_names, "torch", "qgalore"}


def test_the_walk_sees_all_there_is():
    """As many modules as there were when this was written, at whatever depth."""
    least = {"qgalore": 25, "peft_pretraining": 35, "benchmarks": 4, "tests": 60, "torchrun_main": 1}
    assert all(len(sources(ROOT, name)) >= count for name, count in least.items())


def test_qgalore_needs_torch_alone():
    """But for qgalore.hf, the door to transformers, which no other module opens."""
    found = import_rules.imports_beyond(ROOT, "qgalore", allowed=CORE)
    assert found and all(line.startswith("qgalore/hf.py:") and "imports transformers" in line for line in found)
    users = [name for name, path in sources(ROOT, "qgalore").items() for each in imports(path)
             if (each.name + ".").startswith("qgalore.hf.")]  # fmt: skip
    assert not users


def test_peft_pretraining_knows_qgalore_but_not_the_script():
    assert not import_rules.imports_of(ROOT, *PACKAGES, forbidden={"torchrun_main", "benchmarks"})
    assert not import_rules.imports_of(ROOT, "qgalore", forbidden={"peft_pretraining"})


def test_heavy_packages_are_imported_where_they_are_used():
    assert not import_rules.imports_of(ROOT, *PROGRAM, forbidden=OPTIONAL, when_loaded=True)


def test_all_imports_are_by_full_name():
    assert not import_rules.relative_imports(ROOT, *PROGRAM, "tests")


def test_no_module_imports_itself_round_a_corner():
    """Within a package, too, the arrows point one way: no cycles."""
    assert not import_rules.module_cycle(ROOT, *PACKAGES)


def test_no_sub_package_imports_itself_round_a_corner():
    assert not import_rules.package_cycle(ROOT, *PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_what_a_package_passes_on_is_for_others(package):
    """Inside, a name is imported from the module that defines it."""
    assert not import_rules.names_from_the_top(ROOT, package)


def test_every_folder_of_modules_is_a_package():
    assert not import_rules.folders_without_init(ROOT, *PACKAGES)


def test_test_files_import_none_of_their_kind():
    """What two of them need lies in tests/support."""
    assert not import_rules.imports_of_tests(ROOT, "tests")


def test_importing_touches_no_gpu_and_nothing_optional():
    """Importing the whole program leaves CUDA alone and loads neither wandb, datasets nor peft; nor matplotlib, which
    peft_pretraining.report needs and loads when the first page is drawn."""
    code = (
        "import sys, torchrun_main, torch; "
        "assert not torch.cuda.is_initialized(); "
        f"loaded = [name for name in {(*OPTIONAL, 'matplotlib')} if name in sys.modules]; "
        "assert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# The rules themselves, on small trees that break them deep down


def plant(root: Path, files: dict[str, str]) -> Path:
    """Writes sources; folders without an __init__.py get an empty one."""
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source + "\n")
        for folder in [path.parent, *path.parent.parents]:
            if folder == root:
                break
            (folder / "__init__.py").touch()
    return root


def plant_line(root: Path, line: str) -> Path:
    """A package qgalore with one line of source, three folders down."""
    return plant(root, {"qgalore/a/b/deep.py": line, "qgalore/plain.py": "", "qgalore/a/other.py": ""})


def deferred(line: str) -> list[str]:
    """A line of source where only a walk through the whole tree meets it."""
    return [f"def f():\n    {line}", f"class A:\n    def f(self):\n        {line}", f"if TYPE_CHECKING:\n    {line}"]


def test_a_walk_that_would_see_nothing_fails(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere", "no.where"):
        with pytest.raises(AssertionError, match="no source of"):
            sources(tmp_path, name)
    found = sources(plant_line(tmp_path, ""), "qgalore")
    assert set(found) == {"qgalore", "qgalore.plain", "qgalore.a", "qgalore.a.other", "qgalore.a.b", "qgalore.a.b.deep"}


@pytest.mark.parametrize(
    "line",
    ["from qgalore.a.two import g", "import qgalore.a.two", "from qgalore.a import two", "from qgalore.a.two import *"]
    + deferred("from qgalore.a.two import g"),
)
def test_a_ring_of_modules_is_found(tmp_path, line):
    files = {"qgalore/a/b/one.py": line, "qgalore/a/two.py": "from qgalore.a.b.one import f"}
    assert set(import_rules.module_cycle(plant(tmp_path, files), "qgalore")) == {"qgalore.a.b.one", "qgalore.a.two"}


def test_a_ring_through_two_packages_or_an_init_is_found(tmp_path):
    files = {"one/a/x.py": "import two.b.y", "two/b/y.py": "def f():\n    from one.a.x import g"}
    assert set(import_rules.module_cycle(plant(tmp_path, files), "one", "two")) == {"one.a.x", "two.b.y"}
    files = {"three/a/__init__.py": "from three.a.x import f", "three/a/x.py": "from three.a import g"}
    assert set(import_rules.module_cycle(plant(tmp_path, files), "three")) == {"three.a", "three.a.x"}


@pytest.mark.parametrize("above", ["qgalore", "qgalore/deep", "qgalore/deep/er"])
@pytest.mark.parametrize("line", ["from NAME.a.two import f", *deferred("import NAME.a.two")])
def test_a_ring_of_packages_is_found_where_modules_make_none(tmp_path, above, line):
    name = above.replace("/", ".")
    files = {"a/one.py": f"import {name}.b.c.one", "b/c/one.py": "", "a/two.py": "", "b/two.py": ""}
    files["b/two.py"] = line.replace("NAME", name)
    plant(tmp_path, {f"{above}/{path}": source for path, source in files.items()})
    assert not import_rules.module_cycle(tmp_path, "qgalore")
    assert set(import_rules.package_cycle(tmp_path, "qgalore")) == {f"{name}.a", f"{name}.b"}


def test_a_module_beside_packages_counts_as_one(tmp_path):
    files = {"qgalore/top.py": "import qgalore.a.one", "qgalore/a/one.py": "", "qgalore/a/two.py": "import qgalore.top"}
    assert set(import_rules.package_cycle(plant(tmp_path, files), "qgalore")) == {"qgalore.top", "qgalore.a"}


def test_an_init_may_pass_on_what_lies_below_it(tmp_path):
    files = {
        "qgalore/__init__.py": "from qgalore.a import f\nfrom qgalore.b.two import g\nfrom qgalore.plain import h",
        "qgalore/a/__init__.py": "from qgalore.a.one import f",
        "qgalore/a/one.py": "from qgalore.b.two import g\nfrom qgalore import plain",
        "qgalore/b/two.py": "from qgalore.plain import h",
        "qgalore/plain.py": "",
    }
    plant(tmp_path, files)
    assert not import_rules.module_cycle(tmp_path, "qgalore")
    assert not import_rules.package_cycle(tmp_path, "qgalore")
    assert not import_rules.names_from_the_top(tmp_path, "qgalore")


@pytest.mark.parametrize(
    "line",
    ["from qgalore import f", "import qgalore", "from qgalore import *", *deferred("from qgalore import plain, f")],
)
def test_names_from_the_top_are_found(tmp_path, line):
    (found,) = import_rules.names_from_the_top(plant_line(tmp_path, line), "qgalore")
    assert found.startswith("qgalore/a/b/deep.py:")


@pytest.mark.parametrize(
    "line", ["import numpy", "from peft_pretraining.model import f", *deferred("import a.b, torch")]
)
def test_what_needs_more_than_torch_is_found(tmp_path, line):
    (found,) = import_rules.imports_beyond(plant_line(tmp_path, line), "qgalore", allowed=CORE)
    assert found.startswith("qgalore/a/b/deep.py:")
    assert not import_rules.imports_beyond(plant_line(tmp_path, "import torch, os"), "qgalore", allowed=CORE)


@pytest.mark.parametrize("line", ["import torchrun_main", *deferred("from torchrun_main import train_step")])
def test_what_knows_the_script_is_found(tmp_path, line):
    (found,) = import_rules.imports_of(plant_line(tmp_path, line), "qgalore", forbidden={"torchrun_main"})
    assert "imports torchrun_main" in found


@pytest.mark.parametrize(
    "line",
    [
        "import wandb",
        "from datasets import load_dataset",
        "try:\n    import wandb\nexcept ImportError:\n    pass",
        "if True:\n    import pyarrow.parquet",
        "class A:\n    import peft",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import wandb",
    ],
)
def test_what_loads_heavy_packages_is_found(tmp_path, line):
    found = import_rules.imports_of(plant_line(tmp_path, line), "qgalore", forbidden=OPTIONAL, when_loaded=True)
    assert len(found) == 1 and found[0].startswith("qgalore/a/b/deep.py:")
    for later in deferred("import wandb"):
        plant_line(tmp_path, later)
        assert not import_rules.imports_of(tmp_path, "qgalore", forbidden=OPTIONAL, when_loaded=True)


@pytest.mark.parametrize("line", ["from . import other", "from ..plain import f", *deferred("from .. import other")])
def test_relative_imports_are_found(tmp_path, line):
    (found,) = import_rules.relative_imports(plant_line(tmp_path, line), "qgalore")
    assert found.startswith("qgalore/a/b/deep.py:")
    with pytest.raises(AssertionError, match="whose names are not known"):
        import_rules.module_cycle(tmp_path, "qgalore")


def test_a_folder_that_is_no_package_is_found(tmp_path):
    (plant_line(tmp_path, "") / "qgalore" / "a" / "b" / "__init__.py").unlink()
    assert import_rules.folders_without_init(tmp_path, "qgalore") == ["qgalore/a/b"]


@pytest.mark.parametrize(
    "line",
    [
        "from test_one import f",
        "import test_one",
        "import tests.deep.test_one",
        "from tests.deep import test_one",
        'CODE = """\nimport sys\nfrom test_one import *\n"""',
        'def f(x):\n    return f"""\n{x}\n    import test_one\n"""',
        *deferred("from test_one import f"),
    ],
)
@pytest.mark.parametrize("place", ["tests/test_two.py", "tests/deep/test_two.py", "tests/support/two.py"])
def test_an_import_of_a_test_file_is_found(tmp_path, line, place):
    plant(tmp_path, {"tests/deep/test_one.py": "from support.one import f", "tests/support/one.py": "", place: line})
    (found,) = import_rules.imports_of_tests(tmp_path, "tests")
    assert found.startswith(place)
