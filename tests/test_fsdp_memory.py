"""Plans of --parallel fsdp against ranks that run for real."""

import pytest
import torch
from support.ranks import run_distributed

from peft_pretraining.cli.args import parse_args
from peft_pretraining.training.memory_plan import plan_memory

INT8 = ["--weight_quant", "--stochastic_round", "--proj_quant"]
CASES = {
    "q_galore per layer": ["--optimizer", "q_galore_adamw8bit_per_layer", "--rank", "32", *INT8],
    "galore": ["--optimizer", "galore_adamw", "--rank", "32"],
    "adamw": ["--optimizer", "adamw"],
}


def arguments(*flags, config, ranks=2):
    shared = ["--model_config", config, "--dataset", "pydocs", "--batch_size", "1", "--max_length", "64"]
    return parse_args([*shared, "--parallel", "fsdp", *flags], world_size=ranks)


def measured(flags, config):
    run = plan_memory(arguments(*flags, config=config), dtype=torch.bfloat16, device_type="cpu", ranks=2, real=True)
    return run.held, {phase: tuple(peak) for phase, peak in run.peaks.items()}


@pytest.mark.parametrize("config", ["configs/llama_3m.json", "configs/llama_9m.json"])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_a_rank(case, config):
    plan = plan_memory(arguments(*CASES[case], config=config), dtype=torch.bfloat16, device_type="cpu", ranks=2)
    for held, peaks in run_distributed(measured, CASES[case], config):
        print(plan.held, held, sep="\n")
        for phase, peak in plan.peaks.items():
            print(phase, peak, peaks[phase], peak.bytes / peaks[phase][0], sep="\n   ")
    assert 0
