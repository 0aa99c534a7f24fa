"""The benchmarks run and print their tables, on models that take seconds. Figures are not looked at."""

import json
import re
from pathlib import Path

import pytest
from support.runs import shell

import torchrun_main
from benchmarks import memory_plan

SMALL = ["--model_config", "configs/llama_3m.json", "--dataset", "pydocs"]


def rows(text):
    """The cells of a Markdown table's rows, by its heads."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_a_plan_of_memory_is_a_table(capsys, tmp_path):
    flags = ["--model_config", "configs/llama_3m.json", "--batch_size", "2", "--optimizer", "galore_adamw"]
    assert memory_plan.main([*flags, "--output", str(tmp_path / "plan.jsonl")]) == 0
    held, *phases = rows(capsys.readouterr().out)
    assert float(held["MB"].replace(",", "")) > 10 and len(phases) == 5
    assert len((tmp_path / "plan.jsonl").read_text().splitlines()) == 6
    assert memory_plan.main(["--model_config", "configs/none.json", "--batch_size", "2"]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path("benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_what_they_take_from_the_program_is_there(path):
    """Also in code that they give to other processes, which only slow tests run."""
    code = path.read_text()
    assert not [name for name in re.findall(r"\bscript\.(\w+)", code) if not hasattr(torchrun_main, name)]


@pytest.mark.slow
def test_whole_updates_take_turns(tmp_path):
    out = tmp_path / "out.jsonl"
    command = ["python", "benchmarks/train_step.py", *SMALL, "--rank", "16", "--rounds", "2", "--updates", "1"]
    result = shell([*command, "--batch_size", "1", "--only", "Q-GaLore per", "--output", str(out)])
    assert result.returncode == 0, result.stderr
    adamw, ours = rows(result.stdout)
    assert (adamw["case"], ours["case"], adamw["/ AdamW"]) == ("AdamW", "Q-GaLore per layer", "1")
    assert [json.loads(line)["case"] for line in out.read_text().splitlines()] == ["AdamW", "Q-GaLore per layer"]


@pytest.mark.slow
@pytest.mark.parametrize("limit, fits", [("4", True), ("0.05", False)])
def test_a_limit_of_memory_is_kept_or_ends_the_run(limit, fits):
    """Saved after the second update, resumed by another process, exported; or told that a process has ended."""
    command = ["python", "benchmarks/train_7b.py", *SMALL, "--rank", "16", "--updates", "2", "--threads", "1"]
    result = shell([*command, "--limit", limit])
    if not fits:
        assert result.returncode != 0 and "has ended with status" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    phases = [row["phase"] for row in rows(result.stdout.partition("\n\n")[0])]
    assert [phase for phase in phases if phase.startswith("update")] == ["update 1", "update 2", "update 3"]
    assert phases[-1] == "exporting the model"
