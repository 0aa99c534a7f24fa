"""`python -m qgalore.memory`, and the event `memory` of a run."""

import json
import re

import pytest
import torch
from support.runs import record, run, shell

import torchrun_main
from peft_pretraining import memory
from peft_pretraining.cli.args import parse_args
from peft_pretraining.training.memory_plan import plan_memory
from peft_pretraining.training.memory_watch import MemoryWatch
from peft_pretraining.training.metrics import Record, Sink
from qgalore.factory import OPTIMIZERS
from qgalore.live_memory import Peak
from qgalore.memory import __main__ as entry

SHAPE = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=20_000)
ELEMENTS = 2 * 20_000 * 64 + 4 * 64 * 64 + 3 * 64 * 128 + 3 * 64


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "wide.json"
    path.write_text(json.dumps(SHAPE | {"max_position_embeddings": 64}))
    return str(path)


def table(capsys, *flags):
    """The cells of the rows that the command prints, by method, and all that it prints."""
    assert memory.main([*flags, "--max_length", "32", "--batch_size", "2"]) == 0
    text = capsys.readouterr().out
    found = {}
    for line in text.splitlines():
        cells = re.split(r"\s{2,}", line)
        if cells[0] in memory.METHODS:
            found[cells[0]] = dict(zip(memory.WIDTHS, cells, strict=True))
    return found, text


def test_every_method_has_a_row(config, capsys, monkeypatch):
    """Weights, moments and peak of two of them against bytes by hand and against the plan."""
    few = {name: memory.METHODS[name] for name in ("adamw", "q_galore_adamw8bit_per_layer", "adamw --peft lora")}
    assert memory.METHODS.keys() >= OPTIMIZERS.keys()
    monkeypatch.setattr(memory, "METHODS", few)
    rows, text = table(capsys, config, "--rank", "16")
    assert rows.keys() == few.keys()
    assert int(rows["adamw"]["weights"]) == round(2 * ELEMENTS / 1e6)
    assert int(rows["adamw"]["moments"]) == pytest.approx(12 * ELEMENTS / 1e6, abs=1)  # with a float32 copy
    assert rows["adamw"]["fits, GB"] == "8, 12, 16, 24, 40, 80"
    for row in rows.values():
        args = parse_args(["--model_config", config, "--dataset", "pydocs", "--batch_size", "2", "--max_length", "32",
                           "--rank", "16", *few[row["method"]]])  # fmt: skip
        assert int(row["peak"]) == round(plan_memory(args, dtype=torch.bfloat16).peak.bytes / 1e6)
    rows, text = table(capsys, config, "--rank", "16", "--weight_quant")
    assert rows.keys() == {"q_galore_adamw8bit_per_layer", "adamw --peft lora"}, "the second is QLoRA then"
    assert "left out: adamw: --weight_quant" in text


def test_one_method_is_shown_by_kind_and_on_each_of_several_gpus(config, capsys):
    _, text = table(capsys, config, "--optimizer", "adamw")
    held = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.split()[1:]}
    assert float(held["weights"]) == pytest.approx(2 * ELEMENTS / 1e6, abs=0.1)
    assert float(held["moments"]) == pytest.approx(12 * ELEMENTS / 1e6, abs=0.1)
    _, several = table(capsys, config, "--optimizer", "adamw", "--ranks", "4", "--total_batch_size", "8")
    assert "1 micro-batch of 2 x 32 tokens on each of 4 GPUs" in several
    assert several.splitlines()[1:] == text.splitlines()[1:]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["configs/none.json"], "configs/none.json: cannot be read"),
        (["configs/llama_9m.json", "--ranks", "0"], "--ranks 0: must be at least 1"),
        (["configs/llama_9m.json", "--fit", "16GB"], "torchrun_main.py --dry_run"),
        (["configs/llama_9m.json", "--rnak", "8"], "--rank"),
        (["configs/llama_9m.json", "--dtype", "float16"], "unknown --dtype 'float16'"),
        ([], "config"),
    ],
)
def test_bad_input_is_one_line(flags, says, capsys):
    assert memory.main(flags) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("error: ") and says in line and not out


def test_it_runs_as_a_module_and_says_what_it_needs(config, monkeypatch, capsys):
    result = shell(["python", "-m", "qgalore.memory", config, "--optimizer", "sgd", "--max_length", "32"])
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "fits cards of 8, 12, 16, 24, 40, 80 GB" in result.stdout
    monkeypatch.setattr(entry, "find_spec", lambda name: None)
    assert entry.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs peft_pretraining" in line and "pip install -r requirements.txt" in line


class Events(Sink):
    def __init__(self):
        self.seen = []

    def event(self, name, fields):
        self.seen.append((name, fields))


def watched(*, evaluated=False, refreshes=()):
    """The events of an optimizer whose bases are refreshed in these updates, besides the first."""
    from support.models import Model

    from qgalore import LowRankOptimizer

    model = Model()
    matrix = next(p for p in model.parameters() if p.ndim == 2)
    optimizer = LowRankOptimizer([{"params": [matrix], "rank": 4}], lr=0.1)
    state = optimizer.updates[matrix].state
    peaks = {
        "the first update": Peak(10, {"weights": 10}, ""), "an update": Peak(20, {"weights": 20}, ""),
        "an update with refreshes": Peak(30, {"weights": 20, "refresh": 10}, ""), "evaluation": Peak(40, {}, ""),
    }  # fmt: skip
    events, watch = Events(), MemoryWatch(peaks, device=torch.device("cpu"))
    for update in range(1, 9):
        state["refreshes"] = 1 + sum(refresh <= update for refresh in refreshes)
        watch.after_update(Record(events), update=100 + update, optimizer=optimizer, evaluated=evaluated)
    return [(fields["update"], fields["when"], fields["planned_peak"]) for _, fields in events.seen]


def test_the_watch_speaks_twice():
    """After the third update of the process, and after the first refresh beyond the first bases."""
    assert watched() == [(103, "third update", 20)]
    assert watched(refreshes=[5, 6]) == [(103, "third update", 20), (105, "first refresh", 30)]
    assert watched(refreshes=[2]) == [(102, "first refresh", 30), (103, "third update", 30)]
    assert watched(evaluated=True) == [(103, "third update", 40)]


def test_a_run_without_fit_on_a_cpu_plans_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_pretraining.training.memory_report.plan_memory", None)
    run(tiny, tmp_path / "run", num_training_steps=3)
    assert record(tmp_path / "run", "memory") == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_plan_is_near_what_was_measured(tiny, tmp_path):
    flags = tiny.flags(tmp_path / "run", model_config="configs/llama_9m.json", dtype="bfloat16", max_length=256,
                       batch_size=8, optimizer="galore_adamw", rank=32, update_proj_gap=4)  # fmt: skip
    assert torchrun_main.command_line(flags) == 0
    lines = record(tmp_path / "run", "memory")
    assert {line["when"] for line in lines} == {"third update", "first refresh"}
    for line in lines:
        assert line["planned_peak"] == pytest.approx(line["measured_peak"], rel=0.1)
