"""Nothing that is read can run: no pickles, no code from data or configs, no paths out of --save_dir."""

import ast
import pickle
from pathlib import Path

import pytest
from support.checkpoints import Bomb, replace_file
from support.command_line import refusal
from support.runs import ROOT
from support.source_code import sources

import torchrun_main
from peft_pretraining.checkpoint.run_folder import make_save_dir

CODE = ("torchrun_main", "qgalore", "peft_pretraining", "benchmarks", "tests.support")
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
OBJECT_COLLECTIVES = {"all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"}


def dangers(source: str) -> list[str]:
    """What in a file could run what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLERS:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            found += _dangers_of_call(node)
    return found


def _dangers_of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    found = []
    if isinstance(call.func, ast.Name) and name in RUNNERS:
        found.append(name)
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        found.append("torch.load")
    if name.split(".")[-1] in OBJECT_COLLECTIVES or name in ("os.system", "os.popen"):
        found.append(name)
    return found + [key for key in ("shell", "trust_remote_code", "allow_pickle") if given.get(key, "False") != "False"]


def dangers_below(root: Path, *names: str) -> list[str]:
    """The same of all files of these packages and modules, at any depth, each with its module's name."""
    return [
        f"{module}: {danger}" for module, path in sources(root, *names).items() for danger in dangers(path.read_text())
    ]


def test_no_code_runs_what_it_reads():
    assert not dangers_below(ROOT, *CODE)
    assert len(sources(ROOT, *CODE)) >= 80, "a walk that sees little says little"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(objects, mine)",
        "os.system(text)",
    ],
)
def test_the_walk_finds_what_it_looks_for(source, tmp_path):
    """However deep it lies: in folders, and in functions."""
    assert len(dangers(source)) == 1
    deep = tmp_path / "package" / "in" / "another"
    deep.mkdir(parents=True)
    (deep / "module.py").write_text(f"class A:\n    def f(path):\n        {source}\n")
    (tmp_path / "package" / "__init__.py").touch()
    assert dangers_below(tmp_path, "package") == [f"package.in.another.module: {danger}" for danger in dangers(source)]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "config.json"]
)
def test_a_pickle_in_place_of_a_checkpoints_file_is_refused_unread(tiny, tmp_path, capsys, name):
    """Even where the manifest vouches for it: whoever can write one can write the other."""
    assert torchrun_main.command_line(tiny.flags(tmp_path / "run")) == 0
    folder, mark = tmp_path / "run" / "checkpoint-00000006", tmp_path / "boom"
    content = pickle.dumps(Bomb(mark))
    replace_file(folder, name, content)
    message = refusal(tiny.flags(tmp_path / "other", continue_from=folder), capsys)
    assert name in message and not mark.exists()
    pickle.loads(content)
    assert mark.exists(), "it would have gone off"


def test_names_from_outside_become_no_paths(tmp_path, monkeypatch):
    """The model's file gives the folder its name; whatever else it is called stays a label."""
    monkeypatch.chdir(tmp_path)
    assert make_save_dir(None, model_config="../../etc/x.json").parent == Path("checkpoints")
    assert make_save_dir(None, model_config="a/../../b.json").name.startswith("b-")
