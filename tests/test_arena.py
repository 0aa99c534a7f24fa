"""The comparison of methods: which trials it asks for, what it makes of their records, and one real trial."""

import math
from functools import partial
from pathlib import Path

import pytest

from benchmarks import arena, trials
from benchmarks.arena_tables import at_best, summary, sweeps
from benchmarks.trials import Bench, Trial, key_of, read_records

ASK = dict(lrs=[0.008], updates=300, seeds=[0, 1, 2], begin_at=0)


def finished(trial: Trial, perplexity: float | None) -> dict:
    """A record like that of run_trial."""
    kept = {"weights": 100, "moments": 200 if trial.method == "AdamW" else 50}
    own = {name: getattr(trial, name) for name in ("method", "lr", "matrix_lr", "beta2", "seed", "updates")}
    return own | {"perplexity": perplexity, "kept_bytes": kept, "tokens_per_second": 1000}


def play(perplexity, *, methods, records=(), **ask) -> list[dict]:
    """All trials until none is wanted. perplexity: that of a trial; None where it diverges."""
    records = list(records)
    while True:
        known = {key_of(record) for record in records}
        wanted = arena.wanted(records, methods=methods, **ASK | ask)
        missing = [trial for trial in wanted if trial.key not in known]
        if not missing:
            return records
        records.append(finished(missing[0], perplexity(missing[0])))
        assert len(records) < 200


def bowl(trial: Trial, *, best: float, beta2: float = 0.95) -> float | None:
    """The lowest at one pair of rates; far above the best rate the run diverges."""
    steps = math.log2(trial.matrix_lr / best)
    return None if steps > 3 else 100 + steps**2 + (trial.beta2 != beta2) + trial.seed


@pytest.mark.parametrize("best", [2.0**-16, 0.001, 0.03])
def test_a_sweep_ends_where_the_best_lies_inside(best):
    """Wherever it is, also where every rate of the beginning diverges; the other seeds are run there alone."""
    records = play(partial(bowl, best=best), methods=["AdamW", "Muon"])
    for method in ("AdamW", "Muon"):
        found = at_best(records, method)
        assert set(found) == {0, 1, 2} and found[1]["beta2"] == 0.95
        rate = found[0]["matrix_lr"]
        assert abs(math.log2(rate / best)) <= 0.5
        swept = {r["matrix_lr"] for r in records if (r["method"], r["beta2"], r["seed"]) == (method, 0.95, 0)}
        tried = {r["matrix_lr"] for r in records if (r["method"], r["beta2"], r["seed"]) == (method, 0.999, 0)}
        assert tried == {rate}, "where the other beta2 is worse, it is not swept"
        assert {rate / 2, rate, rate * 2} <= swept
        assert sum(r["method"] == method and r["seed"] > 0 for r in records) == 2


def test_a_longer_sweep_begins_at_the_best_rates_of_a_shorter():
    short = play(partial(bowl, best=0.004), methods=["AdamW"], seeds=[0])
    longer = play(partial(bowl, best=0.004), methods=["AdamW"], records=short, updates=1200, begin_at=300, seeds=[0])
    added = longer[len(short) :]
    assert [r["matrix_lr"] for r in added] == [0.004, 0.002, 0.008] and {r["beta2"] for r in added} == {0.95}


def test_each_rate_of_the_rest_has_a_sweep_of_its_own():
    """And the other seeds are run at the best rates of all."""

    def perplexity(trial):
        return bowl(trial, best=0.001 * 2 ** (trial.lr > 0.01)) - 5 * (trial.lr > 0.01)

    records = play(perplexity, methods=["AdamW"], lrs=[0.008, 0.016])
    swept = {lr: {r["matrix_lr"] for r in records if (r["lr"], r["beta2"]) == (lr, 0.95)} for lr in (0.008, 0.016)}
    assert swept == {0.008: {0.0005, 0.001, 0.002}, 0.016: {0.001, 0.002, 0.004, 0.0005}}
    assert {(r["lr"], r["matrix_lr"]) for r in records if r["seed"] > 0} == {(0.016, 0.002)}


def test_the_table_pairs_the_seeds():
    records = play(partial(bowl, best=0.001), methods=["AdamW"])
    records += play(lambda trial: 0.9 * bowl(trial, best=0.001), methods=["GaLore"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary(records).splitlines()[2:]]
    assert [row[0] for row in rows] == ["GaLore", "AdamW"]
    assert rows[0][5] == "0.900 ± 0.000" and rows[1][4] == "101.00 ± 0.58" and rows[0][8] == "0.50"
    assert "0.0005: 101.0, 0.001: 100.0, 0.002: 101.0" in sweeps(records)


def test_every_method_is_a_command_line():
    from peft_pretraining.cli.args import parse_args

    bench = Bench("configs/llama_arena_small.json", "books", "t5")
    for name, method in arena.ALL.items():
        trial = Trial(name, method.flags, 0.008, method.matrix_lr, method.beta2[0], 0, 300)
        args = parse_args(trials.arguments(trial, bench, folder="runs"))
        assert not args.ignored.keys() & {flag for flag in method.flags if flag.startswith("--")}
        assert args.lr * args.matrix_lr_ratio == pytest.approx(method.matrix_lr)


def test_a_trial_is_a_run(tiny, tmp_path, monkeypatch):
    """Trained, recorded, read back; one that diverges is recorded as that."""
    own = ("--max_length", "32", "--dtype", "float32", "--max_bad_updates", "1")
    bench = Bench(str(tiny.config), str(tiny.data), str(tiny.tokenizer), batch_size=4, eval_tokens=500, evaluations=2)
    good, bad = (Trial("AdamW", ("adamw", *own), 0.01, rate, 0.95, 0, 4) for rate in (0.01, 1e36))
    out = tmp_path / "out.jsonl"
    records = [trials.run_trial(trial, bench) for trial in (good, bad)]
    assert records[0]["perplexity"] < 100 and records[1]["perplexity"] is None and records[1]["failed"]
    assert [update for update, _ in records[0]["validation"]] == [2, 4] and len(records[0]["training"]) == 4
    assert sum(records[0]["kept_bytes"].values()) > 0
    assert not any(str(Path.cwd()) in str(value) for value in records[0].values())
    monkeypatch.setattr(trials, "run_trial", None)  # all are known
    out.write_text("".join(f"{trials.json.dumps(record)}\n" for record in records))
    assert trials.finish(lambda _: [good, bad], bench, out=out, jobs=1) == read_records(out)
