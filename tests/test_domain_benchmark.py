"""benchmarks/domain.py: which trials it asks for, its table and picture, and that each method is a command line."""

import math

import pytest

from benchmarks import domain
from benchmarks.trials import Bench, Trial, arguments, key_of, run_trial
from peft_pretraining.cli.args import parse_args

BEST = {"full": 1e-4, "LoRA": 9e-3}


def finished(trial: Trial) -> dict:
    """A record like that of run_trial; far above a method's best rate the run diverges."""
    steps = math.log(trial.lr / BEST[trial.method], 3)
    lost = 3 + steps**2 / 100 + trial.seed / 1000
    own = {name: getattr(trial, name) for name in ("method", "lr", "matrix_lr", "beta2", "seed", "updates")}
    return own | {
        "perplexity": None if steps > 3 else math.exp(lost), "validation": [[30, lost + 1], [60, lost]],
        "kept_bytes": {"weights": 2e6}, "tokens_per_second": 1000, "batch_size": 8,
    }  # fmt: skip


@pytest.fixture(scope="module")
def records() -> list[dict]:
    found: list[dict] = []
    while True:
        known = {key_of(record) for record in found}
        asked = domain.wanted(found, methods=list(BEST), updates=60, seeds=[0, 1])
        missing = [trial for trial in asked if trial.key not in known]
        if not missing:
            return found
        found.append(finished(missing[0]))
        assert len(found) < 30


@pytest.mark.parametrize("method", list(BEST))
def test_each_sweep_has_its_best_rate_inside_and_only_that_gets_the_other_seeds(records, method):
    rates = sorted(r["lr"] for r in records if r["method"] == method and r["seed"] == 0)
    others = [r["lr"] for r in records if r["method"] == method and r["seed"] == 1]
    assert len(others) == 1 and rates[0] < others[0] < rates[-1]
    assert abs(math.log(others[0] / BEST[method], 3)) <= 0.51


def test_the_table_has_the_best_first(records):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in domain.table(records).splitlines()]
    assert rows[0][2:5] == ["loss at 30", "loss at 60", "perplexity"]
    assert {row[0] for row in rows[2:]} == set(BEST)
    ends = [float(row[4].split()[0]) for row in rows[2:]]
    assert ends == sorted(ends) and all(row[5] == "2" and row[6] == "2.0" for row in rows[2:])


def test_the_picture_has_a_line_for_each_method(records):
    svg = domain.picture(domain.curves, records, list(BEST))
    assert all(name in svg for name in BEST) and "validation loss" in svg


def test_every_method_is_a_command_line():
    bench = Bench("configs/llama_arena_small.json", "pydocs", "t5", rank=8)
    for name, method in domain.METHODS.items():
        trial = Trial(name, method.flags, method.lr, None, None, 0, 60)
        args = parse_args(arguments(trial, bench, folder="runs"))
        assert not args.ignored.keys() & {flag for flag in method.flags if flag.startswith("--")}
        assert args.rank == 8 or name.startswith("full")


@pytest.mark.slow
def test_a_trial_goes_on_from_the_model(tiny, tmp_path):
    """Fine-tuned at a rate of nearly 0, it ends where it began."""
    own = ("--max_length", "32", "--dtype", "float32")
    shared = dict(dataset=str(tiny.data), batch_size=4, eval_tokens=500, evaluations=1)
    base = tmp_path / "base"
    bench = Bench(str(tiny.config), tokenizer=str(tiny.tokenizer), **shared)
    from torchrun_main import main

    trial = Trial("full", ("adamw", *own), 0.01, None, None, 0, 8)
    main(arguments(trial, bench, folder=str(base)), began=0.0)
    model = base / "model"
    bench = Bench(str(model / "config.json"), tokenizer=str(model), more=("--continue_from", str(model)), **shared)
    found = {}
    for name in ("full", "QLoRA", "Q-GaLore, others frozen"):
        trial = Trial(name, (*domain.METHODS[name].flags, *own, "--rank", "4"), 1e-12, None, None, 0, 1)
        found[name] = run_trial(trial, bench)["perplexity"]
    started = run_trial(Trial("full", ("adamw", *own), 1e-12, None, None, 0, 1), bench)["perplexity"]
    assert all(abs(math.log(each / started)) < 0.1 for each in found.values())
