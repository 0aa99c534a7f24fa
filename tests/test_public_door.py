"""`import qgalore`: the names that others may rely on, and that they are all one needs."""

import re
import subprocess
import sys
import zipfile

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


@pytest.mark.slow
def test_installed_beside_torch_alone_it_trains(tmp_path):
    """The wheel holds every sub-package and its types, and asks for nothing that is not torch's own."""
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    assert (tmp_path / "site" / "qgalore" / "py.typed").exists()
    blocked = "transformers peft_pretraining safetensors loguru datasets wandb peft tqdm sentencepiece".split()
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked})); sys.path.insert(0, {str(tmp_path / 'site')!r});"
        "import torch, qgalore; assert 'site' in qgalore.__file__;"
        "model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.Linear(20, 5));"
        "optimizer = qgalore.LowRankOptimizer(qgalore.make_groups(model, rank=4));"
        "model(torch.randn(7, 30)).square().sum().backward(); optimizer.step()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, check=True)
