"""Runs of the script on one, two and four processes: the same losses but for the order of the sums."""

import pytest
from support.ranks import run_on_two_ranks
from support.runs import losses, run, torchrun

GALORE = dict(rank=8, update_proj_gap=5, subspace="svd")
INT8 = dict(weight_quant=True, weight_group_size=32, stochastic_round=True, proj_quant=True)
METHODS = {
    "adamw": dict(optimizer="adamw"),
    "galore_adamw": GALORE | dict(optimizer="galore_adamw"),
    "galore_adamw_per_layer": GALORE | dict(optimizer="galore_adamw_per_layer"),
    "galore_lion": GALORE | dict(optimizer="galore_lion"),
    "continuous": GALORE | dict(optimizer="galore_adamw", proj_type="continuous"),
    "fira": GALORE | dict(optimizer="galore_adamw", residual="fira"),
    "foam": dict(optimizer="foam"),
    "apollo": dict(optimizer="apollo", rank=8, update_proj_gap=5),
    "iteration": GALORE | dict(optimizer="galore_adamw", subspace="iterate"),
    "q_galore_adamw8bit": GALORE | INT8 | dict(optimizer="q_galore_adamw8bit", rank=16),
    "q_galore_adamw8bit_per_layer": GALORE | INT8 | dict(optimizer="q_galore_adamw8bit_per_layer", rank=16),
}
# Where a last bit tips the rounding of a code of 8 or 4 bits, or a sign of Lion's.
BOUNDS = {"galore_lion": 5e-3, "q_galore_adamw8bit": 5e-3, "q_galore_adamw8bit_per_layer": 5e-3}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_thirty_updates_of_two_micro_batches(tiny, tmp_path, method):
    flags = METHODS[method] | dict(total_batch_size=16, num_training_steps=30, eval_every=100, save_every=100)
    run(tiny, tmp_path / "one", batch_size=8, **flags)
    two = run_on_two_ranks(tiny.flags(tmp_path / "two", check_replicas=10, **flags | dict(batch_size=4)))
    assert two.returncode == 0, two.stderr
    four = torchrun(tiny.flags(tmp_path / "four", check_replicas=10, **flags | dict(batch_size=2)), processes=4)
    assert four.returncode == 0, four.stderr
    wanted = losses(tmp_path / "one")
    apart = [
        max(abs(a / b - 1) for a, b in zip(losses(tmp_path / name), wanted, strict=True)) for name in ("two", "four")
    ]
    print(f"{method}: {apart[0]:.1e} on two, {apart[1]:.1e} on four")
    assert len(wanted) == 30 and max(apart) < BOUNDS.get(method, 1e-5)
