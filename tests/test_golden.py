"""The first twenty losses of llama_9m for each family of optimizers, as they were when this file was written.

Compared exactly on the platform that made them, closely elsewhere. After a change that is meant to change them:
QGALORE_WRITE_GOLDEN=1 python -m pytest tests/test_golden.py
"""

import hashlib
import json
import os
import platform
from pathlib import Path

import pytest
import torch
from support.runs import ROOT, losses

import torchrun_main

GOLDEN = Path(__file__).parent / "golden" / "llama_9m_float32.json"
LOW_RANK = {"rank": 16, "update_proj_gap": 5, "lr": 0.01}
INT8 = {"weight_quant": True, "stochastic_round": True, "proj_quant": True}
FAMILIES: dict[str, dict] = {
    "adam": {},
    "adamw": {},
    "sgd": {"lr": 0.5},
    "adafactor": {"lr": 0.03},
    "adamw8bit": {},
    "galore_adamw": LOW_RANK,
    "q_galore_adamw8bit_per_layer": LOW_RANK | INT8,
}


def platform_key() -> str:
    """What decides the last bit: the processor's vector instructions and torch's build."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")] if cpuinfo.exists() else []
    digest = hashlib.sha256("".join(flags[:1]).encode()).hexdigest()[:16]
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {digest} torch {torch.__version__}"


@pytest.mark.parametrize("optimizer", FAMILIES)
def test_the_first_twenty_losses(tiny, tmp_path, optimizer):
    config = ROOT / "configs" / "llama_9m.json"
    shared = dict(model_config=config, num_training_steps=20, optimizer=optimizer, lr=0.003, eval_tokens="100")
    assert torchrun_main.command_line(tiny.flags(tmp_path, **shared | FAMILIES[optimizer])) == 0
    found = losses(tmp_path)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("QGALORE_WRITE_GOLDEN"):
        golden[optimizer] = {"platform": platform_key(), "losses": found}
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    expected = golden[optimizer]["losses"]
    assert found == pytest.approx(expected, rel=2e-2)
    assert found[-1] < 0.8 * found[0], "it learns"
    if golden[optimizer]["platform"] == platform_key():
        assert found == expected
