"""Plans of memory against runs for real: the same watcher on real tensors, and the allocator's own record."""

import json

import pytest
import torch
from support.runs import shell

from benchmarks.support import allocated_at_most
from peft_pretraining.cli.args import parse_args
from peft_pretraining.model.build import prepare_model
from peft_pretraining.model.config import read_config
from peft_pretraining.training import memory_plan
from peft_pretraining.training.memory_plan import plan_memory
from peft_pretraining.training.plan import open_updates
from qgalore.memory import kept_bytes
from qgalore.optimizer import LowRankOptimizer

INT8 = ["--weight_quant", "--stochastic_round", "--proj_quant"]
CASES = {
    "adamw": ["--optimizer", "adamw"],
    "galore per layer": ["--optimizer", "galore_adamw_per_layer", "--rank", "16"],
    "q_galore": ["--optimizer", "q_galore_adamw8bit", "--rank", "16", *INT8],
    "q_galore per layer": ["--optimizer", "q_galore_adamw8bit_per_layer", "--rank", "16", *INT8],
    "fira": ["--optimizer", "q_galore_adamw8bit", "--rank", "16", *INT8, "--residual", "fira"],
    "average": ["--optimizer", "galore_adamw8bit", "--rank", "32", "--subspace", "average"],
    "magma": ["--optimizer", "adamw8bit", "--weight_quant", "--stochastic_round", "--skip_updates", "magma"],
    "online pca": ["--optimizer", "galore_adamw", "--rank", "16", "--proj_type", "continuous"],
    "foam": ["--optimizer", "foam"],
}
WAYS = {"four": ["--gradient_accumulation", "4"], "recomputed": ["--activation_checkpointing"]}


DEEP = {  # of the layers of a model that is deep enough for a plan from few of them
    "adamw": ["--optimizer", "adamw", "--grad_clipping", "1"],
    "q_galore per layer, four": [*CASES["q_galore per layer"], "--gradient_accumulation", "4"],
    "q_galore, a refresh in two layers": [*CASES["q_galore"], "--update_proj_gap", "12"],
}
DEEP_SLOW = {
    "fira, recomputed": [*CASES["fira"], "--activation_checkpointing", "--offload_activations"],
    "on the host": [*CASES["q_galore per layer"], "--gradient_accumulation", "4", "--accumulate_on", "host"],
    "online pca": CASES["online pca"],
    "foam": CASES["foam"],
    "lora": ["--optimizer", "adamw", "--peft", "lora"],
    "adafactor": ["--optimizer", "galore_adafactor_per_layer", "--rank", "16"],
    "lean": [
        *CASES["q_galore per layer"],
        "--proj_type",
        "auto",
        "--moments_bits",
        "4",
        "--embedding_weight_bits",
        "8",
    ],
}


def deep_config(folder, **fields):
    """The file of a model of 8 small layers."""
    shape = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=8, num_attention_heads=4, vocab_size=999)
    (folder / "deep.json").write_text(
        json.dumps(shape | {"max_position_embeddings": 64, "num_key_value_heads": 4} | fields)
    )
    return str(folder / "deep.json")


def arguments(*flags, config="configs/llama_9m.json", batch_size=1):
    shared = ["--model_config", config, "--dataset", "pydocs", "--batch_size", str(batch_size), "--max_length", "64"]
    return parse_args([*shared, *flags])


PROGRAMS = [(case, "one") for case in CASES] + [("q_galore per layer", way) for way in WAYS]
LONGER = ("galore per layer", "fira", "online pca", "foam")


@pytest.mark.parametrize(
    "case, way",
    [pytest.param(*each, marks=pytest.mark.slow if each[0] in LONGER or each[1] in WAYS else ()) for each in PROGRAMS],
)
def test_the_plan_is_the_program(case, way, tiny):
    """Every phase, to the byte of what is alive; and what is held is what the tensors hold."""
    args = arguments(*CASES[case], *WAYS.get(way, []), config=str(tiny.config))
    plan, run = (plan_memory(args, dtype=torch.bfloat16, device_type="cpu", real=real) for real in (False, True))
    assert plan.held == run.held
    assert plan.peaks.keys() == run.peaks.keys()
    building = "building the model"  # the plan leaves out the small temporaries of quantizing
    assert plan.peaks.pop(building).bytes <= run.peaks.pop(building).bytes
    for phase, peak in plan.peaks.items():
        assert peak.bytes == pytest.approx(run.peaks[phase].bytes, rel=0.01), phase
        assert peak.line == run.peaks[phase].line, phase


@pytest.mark.parametrize(
    "flags",
    [pytest.param(flags, id=name) for name, flags in DEEP.items()]
    + [pytest.param(flags, id=name, marks=pytest.mark.slow) for name, flags in DEEP_SLOW.items()],
)
def test_a_plan_from_few_layers_is_that_of_all_to_the_byte(flags, tmp_path, monkeypatch):
    """Every phase: bytes, kinds and the line of the peak. Nothing but few layers has been run."""
    args = arguments(*flags, config=deep_config(tmp_path))
    whole = plan_memory(args, dtype=torch.bfloat16, whole=True)
    monkeypatch.setattr(memory_plan, "_PLANS", {})
    monkeypatch.setattr(memory_plan, "_plan_whole", None)  # it must not be asked
    plan = plan_memory(args, dtype=torch.bfloat16)

    def there(kinds):
        return {kind: size for kind, size in kinds.items() if size}

    assert there(plan.held) == there(whole.held)
    assert plan.peaks.keys() == whole.peaks.keys()
    for phase, peak in plan.peaks.items():
        assert (peak.bytes, there(peak.kinds), peak.line) == (
            whole.peaks[phase].bytes,
            there(whole.peaks[phase].kinds),
            whole.peaks[phase].line,
        ), phase


def test_where_layers_differ_all_are_run(tmp_path):
    """Qwen3 with sliding windows in some layers, and in none."""
    qwen3 = dict(model_type="qwen3", use_sliding_window=True, sliding_window=16)
    for windows, differ in ((4, True), (8, False)):
        config = deep_config(tmp_path, **qwen3, max_window_layers=windows)
        args = arguments(*CASES["adamw"], config=config)
        run = memory_plan._Run(args, read_config(config), torch.bfloat16, "cuda", ranks=1, real=False)
        plan = memory_plan._extend(run)
        assert (plan is None) == differ


@pytest.mark.parametrize(
    "flags",
    [
        CASES["adamw"],
        pytest.param([*CASES["q_galore per layer"], "--gradient_accumulation", "4"], marks=pytest.mark.slow),
    ],
)
def test_the_peak_is_the_allocators(flags):
    """The profiler's record of every allocation on the CPU, which knows what a kernel takes for itself, too."""
    args = arguments(*flags, config="configs/llama_3m.json", batch_size=4)
    most, run = allocated_at_most(lambda: plan_memory(args, dtype=torch.bfloat16, device_type="cpu", real=True))
    plan = plan_memory(args, dtype=torch.bfloat16, device_type="cpu")
    assert plan.peak.bytes == pytest.approx(most, rel=0.05)
    assert plan.peak.bytes == pytest.approx(run.peak.bytes, rel=0.01)


def test_what_is_held_is_what_the_counter_counts():
    """Weights, scales, bases and moments, to the byte but for the allocator's rounding."""
    args = arguments(*CASES["q_galore per layer"])
    plan = plan_memory(args, dtype=torch.bfloat16)
    model = prepare_model(
        args, config=read_config(args.model_config), dtype=torch.bfloat16, device=torch.device("meta")
    )
    optimizer = open_updates(args, model=model).optimizer
    assert isinstance(optimizer, LowRankOptimizer)
    optimizer.allocate()
    for kind, size in kept_bytes(model, optimizer).items():
        assert plan.held.get(kind, 0) == pytest.approx(size, rel=0.01, abs=256 * 512), kind


def test_a_plan_leaves_nothing_behind():
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    plan_memory(arguments(*CASES["q_galore per layer"]), dtype=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == default and torch.is_grad_enabled()


@pytest.mark.slow
def test_options_change_the_plan_as_they_should():
    def peak(*flags):
        return plan_memory(arguments(*flags, config="configs/llama_3m.json"), dtype=torch.bfloat16).peak.bytes

    per_layer = CASES["q_galore per layer"]
    least = peak(*per_layer)
    assert least < peak(*CASES["q_galore"]) < peak(*CASES["adamw"])
    assert least < peak(*per_layer, "--gradient_accumulation", "2")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adamw", "q_galore", "q_galore per layer"])
def test_a_dry_run_of_a_7b_takes_less_than_30_seconds_and_2_gb(case):
    """Of one core, the search for what would make it fit included; seconds of the process, whatever runs beside it."""
    flags = ["--model_config", "configs/llama_7b.json", "--dataset", "pydocs", "--tokenizer", "pydocs", "--dry_run",
             "--batch_size", "16", "--total_batch_size", "512", *CASES[case]]  # fmt: skip
    measure = (
        "import resource, sys, torchrun_main; status = torchrun_main.command_line(sys.argv[1:]); "
        "use = resource.getrusage(resource.RUSAGE_SELF); print(use.ru_utime + use.ru_stime, use.ru_maxrss); "
        "sys.exit(status)"
    )
    result = shell(["python", "-c", measure, *flags], timeout=240)
    assert result.returncode == 0, result.stderr
    seconds, kilobytes = map(float, result.stdout.split())
    assert seconds < 30 and kilobytes < 2e6
    assert "memory, planned" in result.stderr and "it fits" in result.stderr


@pytest.mark.slow
def test_a_7b_is_planned_in_seconds():
    """Held: what the README says. At the peak, one line of ours is named."""
    flags = ["--optimizer", "q_galore_adamw8bit_per_layer", *INT8, "--rank", "1024", "--activation_checkpointing"]
    args = parse_args(["--model_config", "configs/llama_7b.json", "--dataset", "pydocs", "--batch_size", "16", *flags])
    plan = plan_memory(args, dtype=torch.bfloat16)
    assert sum(plan.held.values()) == pytest.approx(11.45e9, rel=0.01)
    assert plan.peak.bytes < 13.7e9
    assert plan.peak.line.partition(":")[0].endswith(".py")
