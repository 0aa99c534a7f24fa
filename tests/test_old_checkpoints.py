"""Checkpoints of format 1 go on as the code that wrote them went on.

tests/old_checkpoints/KIND was written after update 4 of 8 by the last commit of format 1 (0db2bba), from the data,
tokenizer and configs beside it; continued.json has the flags of each kind, and the losses of the four updates and of
the evaluation that followed there. They are compared closely; for torch's own optimizers exactly on the platform that
made them. Ours have other 8-bit codes since, and write a weight some rows at a time.
"""

import json
import shutil

import pytest
import torch
from support.platforms import platform_key
from support.runs import ROOT, losses, record

import torchrun_main
from peft_pretraining.checkpoint.old_format import upgrade_quantized, upgrade_state
from peft_pretraining.model.dtypes import native_bfloat16

FOLDER = ROOT / "tests" / "old_checkpoints"
CONTINUED = json.loads((FOLDER / "continued.json").read_text())
SHARED = (
    "--max_length 32 --batch_size 2 --num_training_steps 8 --lr 0.01 --eval_tokens 500 --workers 0 --num_threads 1 "
)
SHARED += "--wandb_mode disabled --resume auto"
UNCHANGED = ("adafactor", "adamw", "adamw_bfloat16")
# Rounded to 8 or 4 bits, a last bit becomes a step: what another processor's products make of it differs by more.
COARSE = ("8bit", "q_galore", "continuous", "random", "relora")


@pytest.mark.parametrize("kind", CONTINUED["kinds"])
def test_it_goes_on_as_it_did(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the paths of a run are among its flags
    expected = CONTINUED["kinds"][kind]
    flags = f"{SHARED} {expected['flags']}".split()
    if "bfloat16" in kind and not native_bfloat16("cpu"):
        monkeypatch.setattr("peft_pretraining.model.dtypes.native_bfloat16", lambda device: True)
    if "--dtype" not in flags:
        flags += ["--dtype", "float32"]
    shutil.copytree(FOLDER / kind, tmp_path / "checkpoint-00000004")
    data = [part for name in ("train", "validation") for part in (name, f"tests/old_checkpoints/{name}.jsonl")]
    data[0], data[2] = "--dataset", "--validation"
    flags += [*data, "--tokenizer", "tests/old_checkpoints/tiny.model", "--save_dir", str(tmp_path)]
    assert torchrun_main.command_line(flags) == 0
    found, last = losses(tmp_path), record(tmp_path, "eval")[-1]["loss"]
    tolerance = 1e-2 if any(name in kind for name in COARSE) or "bfloat16" in kind else 1e-4
    assert [*found, last] == pytest.approx([*expected["losses"], expected["validation"]], rel=tolerance)
    if CONTINUED["platform"] == platform_key() and kind in UNCHANGED:
        assert [*found, last] == [*expected["losses"], expected["validation"]]


@pytest.mark.parametrize("shape", [(6, 4), (6, 7), (5, 7), (1, 8)])
def test_codes_packed_from_end_to_end_are_packed_by_rows(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    flat = torch.cat([codes.flatten(), torch.zeros(codes.numel() % 2, dtype=torch.uint8)]).view(-1, 2)
    old = {"left.codes": flat[:, 0] | (flat[:, 1] << 4), "left.scale": torch.ones(shape[0], 1), "refresh_seconds": 1.0}
    new = upgrade_state(old)
    assert set(new) == {"left.codes", "left.scale"}
    low, high = new["left.codes"] & 15, new["left.codes"] >> 4
    assert torch.equal(torch.stack([low, high], -1).flatten(1)[:, : shape[1]], codes)
    assert upgrade_state(new) == new


def test_a_class_becomes_a_codec():
    old = {"kind": "SimulatedInt8Weight", "group_size": 16, "dtype": "float32", "stochastic": False}
    new = {"codec": "simulated", "bits": 8, "group_size": 16, "dtype": "float32", "stochastic": False}
    assert upgrade_quantized(old) == new == upgrade_quantized(new)
    with pytest.raises(KeyError):
        upgrade_quantized(old | {"kind": "Int3Weight"})
