"""safetensors files, written one tensor at a time."""

import hashlib
import weakref
from unittest.mock import Mock

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.checkpointed_models import quantize
from transformers import LlamaConfig, LlamaForCausalLM

import torchrun_main
from peft_pretraining import host_memory
from peft_pretraining.checkpoint import snapshot as snapshots
from peft_pretraining.checkpoint.atomic_write import write_checkpoint
from peft_pretraining.checkpoint.snapshot import take_snapshot
from peft_pretraining.checkpoint.tensor_file import TensorFile, write_tensors
from peft_pretraining.training import saving
from qgalore.storage.quantized_weight import open_weight

TENSORS = {
    "bfloat16": torch.randn(3, 4).bfloat16(),
    "float64, no dimension": torch.tensor(1.5, dtype=torch.float64),
    "int64": torch.arange(5),
    "nothing": torch.zeros(0, 4),
    "codes": torch.arange(7, dtype=torch.uint8),
    "float8": torch.randn(4, 5).to(torch.float8_e4m3fn),
    "bools": torch.tensor([True, False, True]),
    "not contiguous": torch.randn(5, 6).T[1:],
    "naïve.weight": torch.randn(3, 3, 3).half(),
}


def test_safetensors_reads_what_was_written(tmp_path):
    sha256 = TensorFile(TENSORS, {"format": "pt", "said": "é\n"}).write(tmp_path / "a")
    assert hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest() == sha256
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "said": "é\n"}
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name].float(), tensor.float())


def test_a_file_without_tensors(tmp_path):
    TensorFile({}).write(tmp_path / "a")
    assert load_file(tmp_path / "a") == {}


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.float64)])
def test_what_was_not_announced_is_not_written(tmp_path, wrong):
    with pytest.raises(AssertionError):
        write_tensors(tmp_path / "a", {"w": torch.zeros(2)}, read=lambda name: wrong, metadata={})


def test_one_tensor_exists_at_a_time(tmp_path):
    alive = []

    def read(name):
        assert not any(reference() is not None for reference in alive), "the earlier ones are gone"
        array = numpy.full((100, 10), float(name), dtype=numpy.float32)
        alive.append(weakref.ref(array))
        return torch.from_numpy(array)

    like = {str(index): torch.empty(100, 10, device="meta") for index in range(5)}
    write_tensors(tmp_path / "a", like, read=read, metadata={})
    assert [tensor.unique().tolist() for _, tensor in sorted(load_file(tmp_path / "a").items())] == [
        [i] for i in range(5)
    ]


# Snapshots without a copy


def model_and_optimizer():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    model = quantize(LlamaForCausalLM(config).bfloat16())
    trained = [p for p in model.parameters() if p.dtype == torch.bfloat16 and not hasattr(p, "stored")]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return model, optimizer


def test_a_snapshot_may_hold_the_run_itself(tmp_path):
    """No tensor is copied, and the files have the bytes that they have with copies."""
    model, optimizer = model_and_optimizer()
    folders = []
    for copied in (True, False):
        taken = take_snapshot(model, optimizer, update=3, progress={}, copied=copied)
        folders.append(write_checkpoint(tmp_path / str(copied), taken))
    held = {
        t.data_ptr() for file in taken.files.values() if isinstance(file, TensorFile) for t in file.tensors.values()
    }
    assert {part.data_ptr() for p in model.parameters() for part in open_weight(p).parts.values()} <= held
    assert {state["exp_avg"].data_ptr() for state in optimizer.state.values()} <= held
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("device, free, stopping, updates, waits", [
    ("cuda", 10**12, False, 9, False),
    ("cuda", None, False, 9, False),
    ("cuda", 10**12, True, 9, True),
    ("cuda", 10**12, False, 3, True),
    ("cuda", 10**3, False, 9, True),
    ("cpu", 10**12, False, 9, True),
])  # fmt: skip
def test_when_training_waits(monkeypatch, device, free, stopping, updates, waits):
    """On a CPU, at the end, after a signal, and where a copy has no room."""
    model, optimizer = model_and_optimizer()
    run = Mock(model=model, stopping=stopping)
    run.updates.optimizer, run.world.device = optimizer, torch.device(device)
    run.state.update, run.args.num_training_steps = 3, updates
    monkeypatch.setattr(saving, "free_host_memory", lambda: free)
    assert saving._training_waits(run) is waits


def test_a_run_on_a_cpu_never_copies_itself(tiny, tmp_path, monkeypatch):
    def refuse(files):
        raise AssertionError("a copy of the model")

    monkeypatch.setattr(snapshots, "_to_host", refuse)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "waits", save_every=2)) == 0
    monkeypatch.undo()
    monkeypatch.setattr(saving, "_training_waits", lambda run: False)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "goes on", save_every=2)) == 0
    for update in (2, 4, 6):
        files = [tmp_path / name / f"checkpoint-0000000{update}" for name in ("waits", "goes on")]
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


@pytest.mark.parametrize(
    "limit, used, free", [("max", "5", 6 * 1024), ("9000", "5000", 4000), ("99999999", "5", 6 * 1024)]
)
def test_free_memory_is_that_of_the_machine_and_of_the_container(tmp_path, monkeypatch, limit, used, free):
    (tmp_path / "limit").write_text(limit), (tmp_path / "used").write_text(used)
    monkeypatch.setattr(host_memory, "_CGROUPS", ((str(tmp_path / "limit"), str(tmp_path / "used")),))
    monkeypatch.setattr(host_memory, "_available", lambda: 6 * 1024)
    assert host_memory.free_host_memory() == free
    monkeypatch.undo()
    assert host_memory.free_host_memory() is None or host_memory.free_host_memory() > 2**20
