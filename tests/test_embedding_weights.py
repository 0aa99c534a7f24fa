"""Embedding and head in codes: the same rows and gradients, a run that resumes, exports, and keeps half the bytes."""

import json

import pytest
import torch
import torch.nn.functional as F
from support import runs
from torch import nn

import torchrun_main
from peft_pretraining.cli.args import parse_args
from peft_pretraining.export.__main__ import export
from peft_pretraining.training.memory_plan import plan_memory
from qgalore.storage.quantized_weight import QuantizedWeight

INT8 = dict(optimizer="q_galore_adamw8bit_per_layer", rank=8, weight_quant=True, stochastic_round=True)
BITS = pytest.mark.parametrize("bits", [8, 4])


@BITS
@pytest.mark.parametrize("simulation", [False, True])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (0,)])
def test_rows_and_gradients_are_those_of_the_values(bits, simulation, shape):
    weight = nn.Parameter(QuantizedWeight.from_float(torch.randn(50, 33), bits=bits, simulation=simulation))
    values = weight.detach().dequantize().requires_grad_()
    ids = torch.randint(50, shape)
    ours, theirs = F.embedding(ids, weight), F.embedding(ids, values)
    assert torch.equal(ours, theirs)
    dy = torch.randn_like(ours)
    ours.backward(dy), theirs.backward(dy)
    assert torch.equal(weight.grad, values.grad)


def test_a_padding_row_gets_no_gradient_and_other_options_see_the_values():
    weight = nn.Parameter(QuantizedWeight.from_float(torch.randn(9, 16)))
    ids = torch.tensor([1, 2, 2, 3])
    F.embedding(ids, weight, padding_idx=2).sum().backward()
    assert weight.grad.sum(1).tolist() == [0, 16, 0, 16, 0, 0, 0, 0, 0]
    scaled = nn.Parameter(QuantizedWeight.from_float(torch.randn(9, 16)))
    F.embedding(ids, scaled, scale_grad_by_freq=True).sum().backward()
    assert scaled.grad.sum(1).tolist() == [0, 16, 16, 16, 0, 0, 0, 0, 0]


def test_nothing_of_the_weights_size_is_made():
    """Forward; the gradient is as large as the weight."""
    weight = nn.Parameter(QuantizedWeight.from_float(torch.randn(4096, 64)))
    ids = torch.randint(4096, (8,))
    with torch.profiler.profile(profile_memory=True) as profiler:
        F.embedding(ids, weight)
    assert max(event.self_cpu_memory_usage for event in profiler.key_averages()) < 4096 * 64 / 8


@BITS
def test_a_run_learns_resumes_and_exports(bits, tiny, tmp_path):
    shared = dict(INT8, embedding_weight_bits=bits, num_training_steps=8, save_every=4)
    runs.run(tiny, tmp_path / "whole", **shared)
    first = sorted((tmp_path / "whole").glob("checkpoint-*"))[0]
    runs.run(tiny, tmp_path / "resumed", **shared, continue_from=first)
    assert runs.losses(tmp_path / "resumed")[-4:] == runs.losses(tmp_path / "whole")[4:]
    runs.run(tiny, tmp_path / "floating", **shared | dict(embedding_weight_bits=None))
    assert runs.losses(tmp_path / "whole") == pytest.approx(runs.losses(tmp_path / "floating"), rel=0.05)
    assert export(tmp_path / "whole", tmp_path / "out", verify=True) == 0
    kept, floating = (runs.record(tmp_path / name, "end")[0] for name in ("whole", "floating"))
    trained = {group["name"]: group["trained_by"] for group in runs.record(tmp_path / "whole", "start")[0]["groups"]}
    assert trained["head"].startswith(f"INT{bits} weights") and trained["embedding"].startswith(f"INT{bits} weights")
    assert kept["updates"] == floating["updates"] == 8


def test_the_plan_of_a_gpu_shrinks():
    flags = "--model_config configs/llama_9m.json --dataset pydocs --batch_size 1 --weight_quant --optimizer adamw8bit"
    floating, codes = (
        plan_memory(parse_args([*flags.split(), *more]), dtype=torch.bfloat16)
        for more in ([], ["--embedding_weight_bits", "8"])
    )
    assert codes.held["weights"] == pytest.approx(floating.held["weights"] - 2 * 32000 * 128, rel=1e-3)


def test_a_tied_head_is_refused(tiny, tmp_path, capsys):
    config = tmp_path / "tied.json"
    config.write_text(json.dumps(json.loads(tiny.config.read_text()) | {"tie_word_embeddings": True}))
    flags = dict(INT8, model_config=config, embedding_weight_bits=8)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "run", **flags)) == 2
    assert "ties the head to the embedding" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
