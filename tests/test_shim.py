"""python -m qgalore.shim: the other packages' names, in programs that know nothing of this one."""

import os
import subprocess
import sys

import pytest
from support.runs import ROOT

from qgalore import shim

TRAINER = """
import sys, torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import galore_torch, q_galore_torch
from q_galore_torch.utils.quantization import prepare_model_for_int8_training, QGaLoreLinear
from q_galore_torch.utils.simulate_quantization import prepare_model_for_int8_training_simulation, QLinear
from q_galore_torch.utils.setup import saving_model_weight, load_model_weight
import qgalore
config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
data = [{"input_ids": row, "labels": row} for row in (torch.arange(16) + torch.arange(32)[:, None]) % 64]
for name in sys.argv[2:]:
    torch.manual_seed(0)
    args = TrainingArguments(
        sys.argv[1], optim=name, optim_target_modules=["attn", "mlp"], optim_args="rank=4,update_proj_gap=3,scale=2.0",
        max_steps=10, per_device_train_batch_size=8, learning_rate=0.01, use_cpu=True, report_to=[], logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=data)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    inner = trainer.optimizer.optimizer
    ours = list(inner.optimizer_dict.values()) if hasattr(inner, "optimizer_dict") else [inner]
    assert all(isinstance(each, qgalore.LowRankOptimizer) for each in ours), name
    assert losses[-1] < losses[0] - 0.2, (name, losses)
    assert not any(torch.equal(p, q) for p, q in zip(before, trainer.model.parameters())), name
"""
NAMES = [
    f"galore_{rule}{layerwise}" for rule in ("adamw", "adamw_8bit", "adafactor") for layerwise in ("", "_layerwise")
]


@pytest.mark.slow
def test_transformers_own_names_run_on_these_optimizers(tmp_path):
    assert shim.main([str(tmp_path / "site")]) == 0
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "out"), *NAMES]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_it_says_what_it_wrote_and_may_be_run_again(tmp_path, capsys):
    for _ in range(2):
        assert shim.main([str(tmp_path)]) == 0
        assert f"export PYTHONPATH={tmp_path}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["galore_torch", "q_galore_torch"]
    for name in shim.FILES:
        compile((tmp_path / name).read_text(), name, "exec")


@pytest.mark.parametrize("name", ["galore_torch", "q_galore_torch"])
def test_another_package_of_the_name_is_left_alone(name, tmp_path, capsys):
    own = tmp_path / name / "__init__.py"
    own.parent.mkdir()
    own.write_text("from .adamw import AdamW as GaLoreAdamW\n")
    assert shim.main([str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {own.parent} exists and was not written by qgalore.shim: choose another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing else was written"
