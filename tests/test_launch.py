"""What a command line, an environment or a number can say wrong: one line, exit status 2, nothing lost."""

import math

import pytest
from support.command_line import refusal
from support.runs import record, shell
from transformers import AutoModelForCausalLM

import torchrun_main
from peft_pretraining.export.__main__ import command_line as export
from peft_pretraining.training import loop

TORCHRUNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize("given, says", [
    (["--lrr", "0.1"], "unknown flag --lrr (did you mean --lr?)"),
    (["--optimzer", "adamw"], "unknown flag --optimzer (did you mean --optimizer?)"),
    (["--weight_quant", "--wieght_bits", "4"], "unknown flag --wieght_bits (did you mean --weight_bits?)"),
    (["--lrr=0.1", "--rnak", "3"], "--lrr (did you mean --lr?). unknown flag --rnak (did you mean --rank?)"),
    (["--xyzzy"], "unknown flag --xyzzy."),
    (["--weight_quant", "true"], "unexpected 'true': every value needs a flag before it"),
    (["adamw"], "unexpected 'adamw'"),
    (["--max_length", "1"], "--max_length 1: must be at least 2"),
    (["--seed", str(2**64)], f"--seed {2**64}: must lie between 0 and"),
    (["--seed", "-1"], "--seed -1: must lie between 0 and"),
    (["--lr", "nan"], "--lr nan"), (["--lr", "inf"], "--lr inf"), (["--batch_size", "0"], "--batch_size 0"),
    (["--num_training_steps", "1e3"], "--num_training_steps"), (["--grad_clipping", "-1"], "--grad_clipping -1.0"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_a_wrong_word_is_named(tiny, tmp_path, capsys, given, says):
    said = refusal([*tiny.flags(tmp_path / "run"), *given], capsys)
    assert says in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment, says", [
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"), ({"RANK": "", "WORLD_SIZE": "1"}, "RANK=''"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'"), ({"LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE='-1'"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE=2, but no MASTER_ADDR and no MASTER_PORT"),
    ({"WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "no RANK"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK=2 and WORLD_SIZE=2"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"), ({"RANK": "1"}, "RANK=1 and WORLD_SIZE=1"), ({"RANK": "x"}, "RANK='x'"),
    ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1 and WORLD_SIZE=1"),
    ({"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}, "srun has started 4 tasks"),
], ids=str)  # fmt: skip
def test_an_environment_that_contradicts_itself_is_named(tiny, tmp_path, capsys, monkeypatch, environment, says):
    for name in TORCHRUNS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert torchrun_main.command_line(tiny.flags(tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line and ("unset" in line or "torchrun" in line)
    assert not (tmp_path / "run").exists()


def test_one_task_of_slurm_is_a_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1"), monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert torchrun_main.command_line(tiny.flags(tmp_path, num_training_steps=1)) == 0


def test_a_model_of_no_use_is_kept_and_said(tiny, tmp_path, capsys, monkeypatch):
    """Its weights overflowed in the last update, after which no gradient is looked at."""
    step = loop.train_step

    def overflow(run):
        step(run)
        if run.state.update == 6:
            run.model.lm_head.weight.data.fill_(math.inf)

    monkeypatch.setattr(loop, "train_step", overflow)
    assert torchrun_main.command_line(tiny.flags(tmp_path)) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the validation perplexity at the end is ") and "no use" in line
    assert record(tmp_path, "end")[0]["perplexity"] is None
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("flags, says", [
    (dict(validation="blank.jsonl"), "no document"), (dict(save_dir="file/inside"), "cannot be written"),
    (dict(tokenizer="no/such.model"), "no such file"), (dict(max_length=100_000), "--max_length 100000"),
], ids=str)  # fmt: skip
def test_a_dry_run_finds_what_the_run_would(tiny, tmp_path, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.jsonl").write_text("\n\n"), (tmp_path / "file").touch()
    save_dir = flags.pop("save_dir", tmp_path / "run")
    for more in ({}, {"dry_run": True}):
        assert says in refusal(tiny.flags(save_dir, **flags, **more), capsys)


def test_a_dry_run_leaves_nothing(tiny, tmp_path):
    assert torchrun_main.command_line(tiny.flags(tmp_path / "run", dry_run=True)) == 0
    assert not (tmp_path / "run").exists()


def test_names_beyond_ascii_where_the_system_knows_only_that(tiny, tmp_path):
    """Under LC_ALL=C, from the file with the shape to the exported folder."""
    folder = tmp_path / "modèle"
    folder.mkdir()
    (folder / "größe.json").write_text(tiny.config.read_text())
    assert torchrun_main.command_line(tiny.flags(folder / "run", model_config=folder / "größe.json")) == 0
    command = ["python", "-m", "peft_pretraining.hf_export", str(folder / "run"), str(folder / "ausgeführt")]
    result = shell(command, LC_ALL="C", LANG="C")
    assert result.returncode == 0, result.stderr
    assert (folder / "ausgeführt" / "model.safetensors").exists()


@pytest.mark.parametrize("line", [torchrun_main.command_line, export])
def test_names_that_the_locale_cannot_spell_are_refused(capsys, line):
    """As Python gives them where UTF-8 was turned off."""
    assert line(["--save_dir", "mod\udcc3\udca8le"]) == 2
    said = capsys.readouterr().err
    assert "set PYTHONUTF8=1" in said and "Traceback" not in said
