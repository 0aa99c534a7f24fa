"""--fit and the cards of a dry run: what is chosen by planning, held against plans and against runs for real."""

import itertools

import pytest
import torch
from support.runs import record

import torchrun_main
from peft_pretraining.cli.args import parse_args, with_flags
from peft_pretraining.cli.flags import parse_memory
from peft_pretraining.distributed import World
from peft_pretraining.errors import UserError
from peft_pretraining.training import memory_fit
from peft_pretraining.training.memory_fit import CONTEXT, RESERVE, SAVINGS, Search, changes, fit_memory, needed
from peft_pretraining.training.memory_plan import plan_memory
from peft_pretraining.training.memory_report import cards_for, smaller_cards
from qgalore.live_memory import LiveMemory

PER_LAYER = ["--optimizer", "adamw8bit_per_layer"]
Q_GALORE = ["--optimizer", "q_galore_adamw8bit_per_layer", "--weight_quant", "--stochastic_round", "--proj_quant"]
UNBOUND = "1000GB"


def ticking(monkeypatch, *, seconds):
    """A process that takes a second for every look at its clock, and a search of so many seconds."""
    ticks = itertools.count()
    monkeypatch.setattr(memory_fit.time, "process_time", lambda: next(ticks))
    return dict(dtype=torch.float32, device_type="cpu", seconds=seconds)


@pytest.fixture
def small_batches(monkeypatch):
    """A micro-batch of any size is large enough."""
    monkeypatch.setattr(memory_fit, "ENOUGH_TOKENS", 1)


def arguments(tiny, *flags, total=8, dtype="float32"):
    shared = ["--model_config", str(tiny.config), "--dataset", "pydocs", "--max_length", "32", "--dtype", dtype]
    return parse_args([*shared, "--total_batch_size", str(total), *flags])


def need(tiny, *flags, **more):
    """What a command line needs of a card, in bytes, by its plan."""
    return needed(plan_memory(arguments(tiny, *flags, **more), dtype=torch.float32, device_type="cpu").peak.bytes)


def as_flag(size):
    return f"{size / 1e6:.6f}MB"


def fitted(tiny, limit, *flags, **more):
    """The arguments that --fit leads to."""
    return fit_memory(arguments(tiny, *flags, "--fit", as_flag(limit), **more), world=World())


@pytest.mark.parametrize(
    "text, size", [("16GB", 16 * 10**9), ("16GiB", 2**34), ("800MB", 8 * 10**8), ("0.5MiB", 2**19), ("auto", "auto")]
)
def test_memory_is_given_with_a_unit(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "0GB", "nanGB", "16gb", "16 TB", "infGiB"])
def test_other_memory_is_one_line(text, tiny, capsys):
    assert torchrun_main.command_line([*tiny.flags("unused"), f"--fit={text}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "16GB (16e9 bytes), 16GiB, 800MB or auto" in line


def test_an_open_batch_needs_the_size_of_an_update(tiny, capsys):
    flags = tiny.flags("unused", batch_size=None)
    assert torchrun_main.command_line([*flags, "--fit", "16GB"]) == 2
    assert "give --total_batch_size" in capsys.readouterr().err
    both = ["--fit", "16GB", "--total_batch_size", "8", "--gradient_accumulation", "2"]
    assert torchrun_main.command_line([*flags, *both]) == 2
    assert "leave out --gradient_accumulation" in capsys.readouterr().err


def test_the_margin_and_the_cards():
    assert needed(10**10) == 10**10 * (1 + RESERVE) + CONTEXT
    assert cards_for(7 * 10**9) == [8, 12, 16, 24, 40, 80]
    assert cards_for(8 * 10**9) == [12, 16, 24, 40, 80]
    most = round((16 * 10**9 - CONTEXT) / (1 + RESERVE))
    assert cards_for(most)[0] == 16 and cards_for(most + 2)[0] == 24
    assert cards_for(10**11) == []


def test_the_largest_micro_batch_that_fits_without_savings(tiny, small_batches):
    """One byte decides; where there is room for the whole update, it is one micro-batch."""
    assert fitted(tiny, 10**12, *PER_LAYER).batch_size == 8
    four = need(tiny, *PER_LAYER, "--batch_size", "4")
    assert four > need(tiny, *PER_LAYER, "--batch_size", "2")
    for limit, batch in ((four + 2, 4), (four - 2, 2)):
        args = fitted(tiny, limit, *PER_LAYER)
        assert (args.batch_size, args.gradient_accumulation, args.total_batch_size) == (batch, 8 // batch, 8)
        assert not args.activation_checkpointing and args.accumulate_on == "device"


@pytest.mark.slow
def test_a_micro_batch_is_large_enough_before_nothing_is_saved(tiny, monkeypatch):
    """128 tokens are asked for: savings come before a micro-batch of fewer, and it before nothing at all."""
    monkeypatch.setattr(memory_fit, "ENOUGH_TOKENS", 128)
    saving = ["--activation_checkpointing", "--accumulate_on", "host"]
    args = fitted(tiny, need(tiny, *PER_LAYER, *saving, "--batch_size", "4") + 2, *PER_LAYER)
    assert args.activation_checkpointing and args.batch_size == 4
    args = fitted(tiny, need(tiny, *PER_LAYER, *saving, "--batch_size", "1") + 2, *PER_LAYER)
    assert args.activation_checkpointing and args.batch_size == 1


def test_one_micro_batch_alone_can_need_less_than_two(tiny, small_batches):
    """It has no sums beside it: the largest micro-batch is tried although half of it does not fit."""
    given = [*PER_LAYER, "--activation_checkpointing", "--accumulate_on", "device", "--max_length", "4"]
    whole, half = (need(tiny, *given, "--batch_size", str(size), total=2) for size in (2, 1))
    assert whole < half
    assert fitted(tiny, whole + 2, *given, total=2).batch_size == 2


def test_savings_come_in_their_order_and_only_where_they_are_needed(tiny):
    """With the micro-batch given, only savings are open; those that a later one makes superfluous are left out."""
    given = [*PER_LAYER, "--batch_size", "4"]
    ways = [[], ["--activation_checkpointing"], ["--activation_checkpointing", "--accumulate_on", "host"]]
    plain, recomputed, host = (need(tiny, *given, *way) for way in ways)
    assert plain > recomputed > host
    assert not fitted(tiny, plain + 2, *given).activation_checkpointing
    args = fitted(tiny, plain - 2, *given)
    assert args.activation_checkpointing and args.accumulate_on == "device" and args.batch_size == 4
    args = fitted(tiny, recomputed - 2, *given)
    assert args.activation_checkpointing and args.accumulate_on == "host" and not args.offload_activations


@pytest.mark.slow
def test_what_is_given_stays(tiny):
    given = [*PER_LAYER, "--batch_size", "4", "--accumulate_on", "device"]
    recomputed = need(tiny, *given, "--activation_checkpointing")
    with pytest.raises(UserError, match="nothing fits"):
        fitted(tiny, need(tiny, *given, "--activation_checkpointing", "--offload_activations") - 2, *given)
    assert fitted(tiny, recomputed + 2, *given).accumulate_on == "device"


def test_what_changes_results_is_proposed_and_taken_only_if_allowed(tiny):
    given = [*PER_LAYER, "--batch_size", "8", "--activation_checkpointing", "--offload_activations"]
    limit = need(tiny, *given) - 2
    with pytest.raises(UserError) as caught:
        fitted(tiny, limit, *given)
    line = str(caught.value)
    assert "\n" not in line and "The least, " in line
    names = line.partition("--allow_changed ")[2].rstrip(".")
    args = fitted(tiny, limit, *given, "--allow_changed", names)
    changed = {name for name in names.split(",") if getattr(args, name) != getattr(arguments(tiny, *given), name)}
    assert changed == set(names.split(","))
    assert needed(plan_memory(args, dtype=torch.float32, device_type="cpu").peak.bytes) <= limit


def test_every_rank_has_its_share(tiny):
    """Two processes: each makes half of the update, and no micro-batch of its own is larger than that."""
    args = parse_args(
        ["--model_config", str(tiny.config), "--dataset", "pydocs", "--fit", UNBOUND, "--total_batch_size", "8"],
        world_size=2,
    )
    args = fit_memory(args, world=World(size=2))
    assert (args.batch_size, args.gradient_accumulation) == (4, 1)


def test_flags_without_effect_are_no_savings(tiny):
    args = arguments(tiny, "--optimizer", "adamw", "--batch_size", "4")
    search = Search(args, dtype=torch.float32, device_type="cpu")
    names = [name for flags in search.steps([*SAVINGS, *changes(args)]) for name in flags]
    assert names == ["activation_checkpointing", "offload_activations"]
    with pytest.raises(UserError, match="no effect"):
        with_flags(args, {"accumulate_on": "host"})


@pytest.mark.slow
def test_what_is_proposed_for_a_card_fits_it(tiny, monkeypatch):
    """Cards of a little less than what is needed; the flags of each line, taken, keep within it."""
    given = [*PER_LAYER, "--batch_size", "8"]
    args = arguments(tiny, *given)
    search = Search(args, dtype=torch.float32, device_type="cpu")
    whole = plan_memory(args, dtype=torch.float32, device_type="cpu").peak.bytes
    unit = whole // 20  # a "GB" of this test
    monkeypatch.setattr("peft_pretraining.training.memory_report.GB", unit)
    monkeypatch.setattr("peft_pretraining.training.memory_fit.CONTEXT", 0)
    lines = list(smaller_cards(search, [20, 18, 12, 1]))
    assert lines[-1].startswith("  1 GB and less: nothing that was tried, not even --activation_checkpointing")
    for line, card in zip(lines, (20, 18, 12), strict=False):
        flags = line.partition(": ")[2].partition(" (")[0].replace("*", "").split()
        peak = plan_memory(arguments(tiny, *given, *flags), dtype=torch.float32, device_type="cpu").peak.bytes
        assert needed(peak) <= card * unit, line
        assert f" {card} GB: " in line


@pytest.mark.slow
def test_a_run_for_real_stays_within_it(tiny, small_batches):
    limit = need(tiny, *PER_LAYER, "--batch_size", "4") + 2
    args = fitted(tiny, limit, *PER_LAYER)
    assert args.batch_size == 4
    run = plan_memory(args, dtype=torch.float32, device_type="cpu", real=True)
    assert needed(run.peak.bytes) <= limit
    args = with_flags(args, {"batch_size": 8})
    run = plan_memory(args, dtype=torch.float32, device_type="cpu", real=True)
    assert needed(run.peak.bytes) > limit


def test_a_run_goes_on_as_it_chose(tiny, tmp_path, small_batches):
    """Three updates, recorded beside their plan; resumed, where it would not choose so again."""
    limit = need(tiny, *PER_LAYER, "--batch_size", "4") + 2
    run = tmp_path / "run"
    flags = tiny.flags(run, batch_size=None, total_batch_size=8, num_training_steps=3)
    flags = [*flags, *PER_LAYER, "--fit", as_flag(limit)]
    assert torchrun_main.command_line(flags) == 0
    (start,) = record(run, "start")
    assert start["args"]["batch_size"] == 4 and "given" not in start["args"]
    (memory,) = record(run, "memory")
    assert memory["when"] == "third update" and memory["update"] == 3 and memory["measured_peak"] is None
    assert sum(memory["planned"].values()) == memory["planned_peak"]
    assert needed(memory["planned_peak"]) <= limit
    more = [*flags, "--num_training_steps", "4", "--allow_changed", "num_training_steps,warmup_steps"]
    with pytest.MonkeyPatch.context() as patch:  # everything needs more than there is
        patch.setattr(memory_fit, "needed", lambda peak: 10**15)
        assert torchrun_main.command_line([*more, "--resume", "auto"]) == 0
    assert [line["update"] for line in record(run, "update")] == [1, 2, 3, 4]
    assert record(run, "start")[-1]["args"]["batch_size"] == 4


def test_nothing_fits_is_one_line_before_anything_is_made(tiny, tmp_path, capsys):
    flags = tiny.flags(tmp_path / "run", batch_size=None, total_batch_size=8)
    assert torchrun_main.command_line([*flags, "--fit", "1MB"]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "INFO" not in line)
    assert line.startswith("error: --fit 1.0 MB: nothing fits. The least, --activation_checkpointing")
    assert not (tmp_path / "run").exists()


def test_a_search_ends_in_time_with_what_it_has_found(tiny, monkeypatch):
    """Too few seconds for a single plan, and as many as a first answer takes."""
    args = arguments(tiny, *PER_LAYER, "--batch_size", "8")
    with monkeypatch.context() as patch:
        (line,) = smaller_cards(Search(args, **ticking(patch, seconds=0)), [16, 8])
        assert line.startswith("  16 GB and less: not tried to the end")
    with monkeypatch.context() as patch:
        lines = list(smaller_cards(Search(args, **ticking(patch, seconds=1)), [16]))
        assert lines[0].startswith("  16 GB: --activation_checkpointing") and "fewer flags may do" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit, chosen",
    [("1.1GB", dict(batch_size=8)), ("0.88GB", dict(batch_size=2, activation_checkpointing=True))],
)
def test_llama_60m_trains_under_its_limit(limit, chosen, tiny, tmp_path, small_batches):
    """For real: what is alive stays under the limit, and would not with the next larger micro-batch."""
    flags = tiny.flags(tmp_path / "run", batch_size=None, total_batch_size=32, num_training_steps=3, dtype="bfloat16",
                       model_config="configs/llama_60m.json", max_length=64)  # fmt: skip
    flags = [*flags, *Q_GALORE, "--rank", "128"]
    fit_memory(parse_args([*flags, "--fit", limit]), world=World())  # plans now what is remembered later
    with LiveMemory() as live:
        assert torchrun_main.command_line([*flags, "--fit", limit]) == 0
    (start,) = record(tmp_path / "run", "start")
    assert {name: start["args"][name] for name in chosen} == chosen
    assert live.peak.bytes + CONTEXT <= parse_memory(limit)
    lines = record(tmp_path / "run", "memory")
    assert live.peak.bytes == pytest.approx(lines[-1]["planned_peak"], rel=0.05)
    more = with_flags(parse_args([*flags, "--batch_size", "1"]), chosen | {"batch_size": 2 * chosen["batch_size"]})
    run = plan_memory(more, dtype=torch.bfloat16, device_type="cpu", real=True)
    assert needed(run.peak.bytes) > parse_memory(limit)
