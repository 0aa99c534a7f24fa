"""Bytes that are counted, and the most that is alive while an update is made."""

import argparse

import pytest
import torch
from support.memory import LiveBytes
from support.runs import ROOT

from peft_pretraining.model.build import build_model, meta_model, weight_quantizer
from peft_pretraining.model.config import read_config
from peft_pretraining.model.loss import token_loss_sum
from qgalore.factory import Settings, create_optimizer, create_updates
from qgalore.memory import kept_bytes
from qgalore.param_groups import split_parameters
from qgalore.storage.convert import quantize_linear_layers
from qgalore.storage.quantized_weight import QuantizedWeight
from qgalore.sync import GradSync

CONFIG = ROOT / "configs" / "llama_60m.json"
SETTINGS = Settings(lr=0.001, rank=128, proj_bits=4, cos_threshold=0.6, update_proj_gap=2)


def q_galore(model, *, per_layer: bool, accumulation: int = 1, watch=lambda p: None):
    """watch(p) is called for each gradient before the updates' own hooks, which free it."""
    quantize_linear_layers(model, select=lambda name: "layers" in name)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(watch)
    name = "q_galore_adamw8bit" + "_per_layer" * per_layer
    optimizer = create_optimizer(name, groups=split_parameters(model), settings=SETTINGS)
    return create_updates(name, optimizer=optimizer, sync=GradSync(), accumulation=accumulation)


def train(model, updates, *, micro_batches: int) -> None:
    for _ in range(micro_batches):
        ids = torch.randint(32000, (1, 16))
        (token_loss_sum(model, ids, ids) / 16).backward()


@pytest.mark.slow
def test_counted_bytes_are_those_that_training_holds():
    """llama_60m, Q-GaLore: on the meta device, and after three real updates. To the byte."""
    planned = meta_model(read_config(CONFIG), dtype=torch.bfloat16)
    plan = q_galore(planned, per_layer=True).optimizer
    plan.allocate()
    counted = kept_bytes(planned, plan)

    model = build_model(read_config(CONFIG), device="cpu", dtype=torch.bfloat16, seed=0)
    updates = q_galore(model, per_layer=True)
    for _ in range(3):
        train(model, updates, micro_batches=1)
        updates.finish()
    assert counted == kept_bytes(model, updates.optimizer, accumulators=updates.sums.values())
    linear = 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert counted["weights"] == linear + 2 * (2 * 32000 * 512 + 17 * 512)
    assert counted["bases"] < 0.54 * 8 * 7 * 512 * 128, "half a byte an element, and the scales"
    with_sums = q_galore_sums(model, updates)
    assert with_sums["accumulators"] > 0


def q_galore_sums(model, updates) -> dict[str, int]:
    """The count between two micro-batches of one update."""
    updates.accumulation = 2
    train(model, updates, micro_batches=1)
    return kept_bytes(model, updates.optimizer, accumulators=updates.sums.values())


def gradients_alive(*, per_layer: bool) -> tuple[int, int]:
    """The most bytes of whole gradients that exist at once in one update of llama_60m, and what is left after it."""
    model = build_model(read_config(CONFIG), device="cpu", dtype=torch.bfloat16, seed=0)
    peak = 0

    def made(p):
        nonlocal peak
        peak = max(peak, sum(q.grad.nbytes for q in model.parameters() if q.grad is not None))

    updates = q_galore(model, per_layer=per_layer, watch=made)
    train(model, updates, micro_batches=1)
    updates.finish()
    return peak, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.slow
def test_per_layer_holds_one_gradient_at_a_time():
    """Never more than one layer's, the embedding's and the head's; the whole model's would be all of them."""
    layer = 2 * (4 * 512 * 512 + 3 * 512 * 1376 + 2 * 512)
    outer = 2 * 2 * 32000 * 512
    inside, left = gradients_alive(per_layer=True)
    assert inside <= layer + outer and left == 0
    after, left = gradients_alive(per_layer=False)
    assert after == 8 * layer + outer + 2 * 512 and left == 0


def test_start_up_needs_no_more_than_training():
    """llama_60m, initialised and quantized module by module: beside the model itself, one matrix in full at a time."""
    config = read_config(CONFIG)
    groups = split_parameters(meta_model(config))
    settings = argparse.Namespace(
        weight_group_size=256,
        stochastic_round=True,
        simulation=False,
        weight_bits=8,
        int8_matmul=None,
        embedding_weight_bits=None,
    )
    finish = weight_quantizer(settings, groups=groups)
    with LiveBytes() as watch:
        model = build_model(config, device="cpu", dtype=torch.bfloat16, seed=0, finish=finish)
    kept = sum(p.codes.nbytes if isinstance(p, QuantizedWeight) else p.nbytes for p in model.parameters())
    matrix = 512 * 1376
    assert kept <= watch.live < 1.05 * kept
    assert watch.peak - watch.live < 12 * matrix, "a float copy, its codes, and chunks; never two layers of them"


def peak_of_an_update(*, per_layer: bool) -> int:
    """The most bytes that a second update of llama_60m makes and holds, beyond what was there before it."""
    model = build_model(read_config(CONFIG), device="cpu", dtype=torch.bfloat16, seed=0)
    updates = q_galore(model, per_layer=per_layer)
    train(model, updates, micro_batches=1)
    updates.finish()
    with LiveBytes() as watch:
        train(model, updates, micro_batches=1)
        updates.finish()
    return watch.peak


@pytest.mark.slow
def test_peak_memory_of_an_update():
    """All live storage is watched, not gradients alone: activations, logits, and what the update itself needs.

    Per layer, the peak lies in the head and the embedding, 33 MB of gradient each, never in the sum of the layers.
    """
    inside, after = peak_of_an_update(per_layer=True), peak_of_an_update(per_layer=False)
    layers = 8 * 2 * (4 * 512 * 512 + 3 * 512 * 1376)
    assert after - inside > 0.8 * layers, (inside, after)
