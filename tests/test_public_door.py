"""`import qgalore`: the names that others may rely on, and that they are all one needs."""

import re
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import version

import pytest
import torch
from support.runs import ROOT

import qgalore

# Who takes a name away, or adds one, does so here, too.
PUBLIC = """
LowRankOptimizer PerLayerUpdates WholeModelUpdates GradSync create_optimizer create_updates set_lr Settings OPTIMIZERS
ParameterGroup split_parameters make_groups quantize_linear_layers dequantize_linear_layers
QuantizedWeight Int8Weight kept_bytes""".split()


def test_the_public_names_are_these():
    assert sorted(qgalore.__all__) == sorted(PUBLIC)
    assert all(hasattr(qgalore, name) for name in PUBLIC)
    assert re.fullmatch(r"\d+\.\d+\.\d+", qgalore.__version__)
    assert all(getattr(qgalore, name).__doc__ for name in PUBLIC if callable(getattr(qgalore, name)))


class Tagger(torch.nn.Module):
    """No LLaMA: words in, a recurrent layer, and a class for each word."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(50, 24)
        self.inner = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 24, bias=False))
        self.norm = torch.nn.LayerNorm(24)
        self.narrow = torch.nn.Linear(24, 4)
        self.head = torch.nn.Linear(24, 50)

    def forward(self, x):
        h = self.norm(self.words(x) + self.inner(self.words(x)))
        return self.head(h + self.narrow(h).mean(-1, keepdim=True))


def test_groups_of_any_module():
    model = Tagger()
    projected, others = qgalore.make_groups(model, rank=8, scale=0.5)
    assert projected["rank"] == 8 and projected["scale"] == 0.5
    assert [p.shape for p in projected["params"]] == [(40, 24), (24, 40)]
    assert len(projected["params"]) + len(others["params"]) == len(list(model.parameters()))
    model.head.weight, model.inner[0].bias.requires_grad = model.words.weight, False
    projected, others = qgalore.make_groups(model, rank=8)
    assert len(projected["params"]) == 2 and not any(p is model.inner[0].bias for p in others["params"])


def test_groups_of_a_transformers_model_leave_its_output_layer_alone():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, tie_word_embeddings=False))
    (group,) = qgalore.make_groups(model, rank=4)
    assert "rank" not in group, "its other layers are Conv1D, no nn.Linear"


def code_of_the_readme() -> str:
    """The first block of Python in the README."""
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def test_the_readmes_six_lines_train_any_module():
    model, words = Tagger(), torch.arange(50).view(5, 10)
    data, loss = [(words, (3 * words + 1) % 50)] * 60, lambda y, t: torch.nn.functional.cross_entropy(y.mT, t)
    code = code_of_the_readme()
    assert len([line for line in code.splitlines() if line.strip()]) <= 6
    before = loss(model(words), data[0][1]).item()
    exec(code, {"model": model, "data": data, "loss": loss})
    assert loss(model(words), data[0][1]).item() < 0.5 * before


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as pip builds it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_has_types_extras_and_the_version(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (path,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(path).decode())
    assert {"qgalore/py.typed", "peft_pretraining/py.typed", "qgalore/rules/rules.py"} <= names
    assert not {name for name in names if name.startswith(("tests", "benchmarks", "scripts"))}
    assert metadata["Version"] == qgalore.__version__ and metadata["Requires-Python"] == ">=3.10"
    assert {"train", "hf", "report", "tensorboard"} <= set(metadata.get_all("Provides-Extra"))
    without_extra = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert without_extra == ["torch>=2.11"]


@pytest.mark.slow
def test_installed_in_a_new_environment_it_asks_for_torch_alone(wheel, tmp_path):
    """pip resolves it there; that environment sees torch and what torch needs, nothing of ours."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--find-links", str(wheel.parent)]
    subprocess.run([*install, "qgalore", f"torch=={version('torch').partition('+')[0]}"], check=True)
    code = (
        "import qgalore, importlib.metadata as m;"
        "names = {d.metadata['Name'].lower() for d in m.distributions()};"
        "assert not names & {'transformers', 'loguru', 'tqdm', 'peft', 'wandb'}, names;"
        "print(qgalore.__version__, len(qgalore.OPTIMIZERS))"
    )
    result = subprocess.run(
        [python, "-W", "ignore", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == [qgalore.__version__, str(len(qgalore.OPTIMIZERS))]


@pytest.mark.slow
def test_beside_torch_alone_it_trains(wheel, tmp_path):
    """The wheel holds every sub-package, and asks for nothing that is not torch's own."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    blocked = "transformers peft_pretraining safetensors loguru datasets wandb peft tqdm sentencepiece".split()
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.path.insert(0, {str(tmp_path / 'site')!r});"
        "import torch, qgalore; assert 'site' in qgalore.__file__;"
        "model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 5));"
        "optimizer = qgalore.LowRankOptimizer(qgalore.make_groups(model, rank=4));"
        "model(torch.randn(7, 30)).square().sum().backward(); optimizer.step()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)
