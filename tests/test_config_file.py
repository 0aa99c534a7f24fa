"""A file for --config says what a command line would; and every run leaves one that does it again."""

import json

import pytest
import yaml
from support.command_line import REQUIRED, flags_refusal, parse
from support.runs import losses, run

import torchrun_main
from peft_pretraining.cli.args import parse_args
from peft_pretraining.cli.config_file import LEFT_OUT, config_text
from peft_pretraining.cli.flags import FLAGS
from peft_pretraining.cli.no_effect import without_effect
from peft_pretraining.cli.presets import preset_names


def from_file(path, text: str, *more: object):
    """The arguments of a command line with this file."""
    path.write_text(text)
    return parse("--config", path, *more)


def refused(path, text: str, *more: object) -> str:
    """Why the file is refused, behind its name."""
    path.write_text(text)
    said = flags_refusal("--config", path, *more)
    assert str(path) in said
    return said.replace(str(path), "FILE")


FLAT = """
optimizer: q_galore_adamw8bit   # as on the command line
lr: 1e-3
eval-tokens: 1.5M
weight_quant: true
proj_quant: no
tags: [trial, 9m]
name: 123
seed: 10_000
tokenizer: null
"""
NESTED = """
optimizer: {optimizer: q_galore_adamw8bit, lr: 0.001}
run: {eval_tokens: 1500000, tags: "trial,9m", name: "123"}
quantization:
  weight_quant: on
training:
  seed: 10000
"""


@pytest.mark.parametrize("text", [FLAT, NESTED, json.dumps(yaml.safe_load(NESTED))], ids=["flat", "nested", "JSON"])
def test_a_file_says_what_a_command_line_does(tmp_path, text):
    flags = "--optimizer q_galore_adamw8bit --lr 1e-3 --eval_tokens 1.5M --weight_quant --tags trial,9m --name 123"
    args = vars(from_file(tmp_path / "c.yaml", text))
    assert args | {"config": None} == vars(parse(*flags.split(), "--seed", 10_000))


def test_a_group_of_comments_says_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("galore:\n  # rank: 4\nlr: 0.5\n")
    args = parse("--config", tmp_path / "c.yaml")
    assert args.lr == 0.5 and args.rank == parse().rank


def test_an_empty_file_says_nothing(tmp_path):
    assert vars(from_file(tmp_path / "c.yaml", "# nothing\n")) | {"config": None} == vars(parse())


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = "preset: q_galore_60m\nlr: 0.5\nrank: 7\nstochastic_round: false\nupdate_proj_gap: null\n"
    args = from_file(tmp_path / "c.yaml", file, "--rank", 9, "--no-weight_quant")
    assert (args.rank, args.lr, args.optimizer) == (9, 0.5, "q_galore_adamw8bit")
    assert not args.stochastic_round and not args.weight_quant and args.proj_quant
    assert args.update_proj_gap == FLAGS["update_proj_gap"].default, "null is the default, not the preset's"


def test_two_ways_to_say_the_same_do_not_contradict_each_other_over_layers(tmp_path):
    path, text = tmp_path / "c.yaml", "max_train_tokens: 1M\ntotal_batch_size: 64\n"
    assert from_file(path, text, "--num_training_steps", 5).num_training_steps == 5
    assert from_file(path, text, "--gradient_accumulation", 2).total_batch_size == 32
    assert from_file(path, "num_training_steps: 5\n", "--max_train_tokens", "1M").num_training_steps == 244
    assert "contradicts" in flags_refusal("--total_batch_size", 64, "--gradient_accumulation", 2)


def test_what_has_no_effect_is_said_of_a_file_too(tmp_path):
    args = from_file(tmp_path / "c.yaml", "rank: 4\nproj_quant: false\nproj_lr: null\n")
    assert args.ignored == {"--rank": "with --optimizer adamw"}


@pytest.mark.parametrize("text, says", [
    ("rank: 8\nrnak: 4", "FILE line 2: there is no flag 'rnak'. Did you mean rank?"),
    ("galore:\n  rnak: 4", "FILE line 2: there is no flag 'rnak'. Did you mean rank?"),
    ("rank: many", "FILE line 1: argument --rank: invalid int value: 'many'. See --help."),
    ("rank: 8.0", "FILE line 1: argument --rank: invalid int value: '8.0'. See --help."),
    ("rank: true", "FILE line 1: argument --rank: invalid int value: 'true'. See --help."),
    ("lr: 1\nrank: 0", "FILE line 2: --rank 0: must be at least 1."),
    ("rank: [8, 9]", "FILE line 1: rank needs one value."),
    ("rank: {a: 8}", "FILE line 1: rank needs one value."),
    ("tags: [[a], b]", "FILE line 1: tags needs one value."),
    ("packing: concatenate", "FILE line 1: argument --packing: invalid choice: 'concatenate'"),
    ("weight_quant: 1", "FILE line 1: weight_quant is a switch: true or false, not '1'."),
    ("weight_quant: 'true'", "FILE line 1: weight_quant is a switch: true or false, not 'true'."),
    ("rank: 8\nlr: 1\nrank: 8", "FILE line 3: rank is there twice."),
    ("save_dir: x\nsave-dir: x", "FILE line 2: save_dir is there twice."),
    ("rank: 8\ngalore: {rank: 8}", "FILE line 2: rank is there twice."),
    ("data:\n  rank: 8", "FILE line 2: the flag rank does not belong to the group data."),
    ("config: other.yaml", "FILE line 1: a file cannot name another one."),
    ("- rank\n- 8", "FILE: lines of the form `name: value` are needed."),
    ("rank 8", "FILE: lines of the form `name: value` are needed."),
    ("rank: 8\n lr: 1", "FILE line 2, column 4: not valid YAML"),
    ("rank: [8", "FILE line 1, column 9: not valid YAML"),
    ("a: &a [1]\n*b : 1", "not valid YAML"),
    ("[" * 3000, "not valid YAML"), ("rank: \x01", "not valid YAML"), ("rank: 8\n---\nrank: 9", "not valid YAML"),
    ("[a, b]: 8", "FILE line 1: there is no flag 'a list'."), ("? [a]\n: 8", "FILE line 1: there is no flag"),
    ("[a]: {b: 1}", "FILE line 1: there is no flag"), ("config_file: x", "there is no flag 'config_file'."),
], ids=lambda text: text[:24])  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_file_line_and_name(tmp_path, text, says):
    assert says in refused(tmp_path / "c.yaml", text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert flags_refusal("--config", tmp_path / "no.yaml").endswith(
        "no.yaml: cannot be read (No such file or directory)."
    )
    assert "cannot be read" in flags_refusal("--config", tmp_path)
    (tmp_path / "c.yaml").write_bytes(b"name: \xff\n")
    assert "not a text file in UTF-8" in flags_refusal("--config", tmp_path / "c.yaml")


def again(args, path, *more: object):
    """The arguments of the file that a run with `args` would leave."""
    path.write_text(config_text(args, leave_out=without_effect(args)))
    return parse_args(["--config", str(path), *map(str, more)])


@pytest.mark.parametrize("flags", [
    *(["--preset", name] for name in preset_names()),
    ["--optimizer", "adamw", "--rank", 4, "--name", "on", "--tags", "1e3", "--project", "größe: #1", "--lr", 1e-7],
    ["--weight_quant", "--optimizer", "q_galore_adamw8bit", "--int8_matmul", "all", "--max_train_tokens", "1M"],
    ["--peft", "relora", "--reset_every", 100, "--gradient_accumulation", 3, "--seed", 2**63 - 1],
], ids=lambda flags: str(flags[1]))  # fmt: skip
def test_the_saved_configuration_is_the_same_run(tmp_path, flags):
    """But for what it leaves out; and nothing in it is without effect."""
    args = parse(*flags)
    found, own = (
        again(args, tmp_path / "c.yaml"),
        {*LEFT_OUT, *without_effect(args), "ignored"} - {"gradient_accumulation"},
    )
    assert {name: value for name, value in vars(found).items() if name not in own} == {
        name: value for name, value in vars(args).items() if name not in own
    }
    assert not found.ignored
    more = again(args, tmp_path / "c.yaml", "--batch_size", 1, "--num_training_steps", 20_000)
    assert more.total_batch_size == more.gradient_accumulation == args.total_batch_size
    assert more.num_training_steps == 20_000


def test_a_run_leaves_a_file_that_does_it_again(tiny, tmp_path):
    """The same losses to the last bit, with no other flag; and a run that goes on keeps the same file."""
    switches = dict(weight_quant=True, stochastic_round=True, weight_group_size=16)
    run(tiny, tmp_path / "one", optimizer="q_galore_adamw8bit", rank=8, num_training_steps=4, **switches)
    saved = tmp_path / "one" / "config.yaml"
    text = saved.read_text()
    assert yaml.safe_load(text)["galore"]["rank"] == 8 and "save_dir" not in text
    assert torchrun_main.command_line(["--config", str(saved), "--save_dir", str(tmp_path / "two")]) == 0
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    more = ["--config", str(saved), "--save_dir", str(tmp_path / "one"), "--resume", "auto"]
    assert torchrun_main.command_line([*more, "--num_training_steps", "4"]) == 0
    assert saved.read_text() == text
    assert (
        torchrun_main.command_line([*more, "--num_training_steps", "6", "--allow_changed", "num_training_steps"]) == 0
    )
    assert len(losses(tmp_path / "one")) == 6 and "num_training_steps: 6" in saved.read_text()


def test_a_full_disk_costs_the_file_not_the_run(tiny, tmp_path, capsys):
    """Here a folder is in its way."""
    (tmp_path / "config.yaml" / "inside").mkdir(parents=True)
    run(tiny, tmp_path, num_training_steps=1)
    assert "config.yaml could not be written" in capsys.readouterr().err


def test_an_evaluation_takes_flags_from_a_file(tiny, tmp_path, capsys):
    run(tiny, tmp_path / "run", num_training_steps=1)
    (tmp_path / "c.yaml").write_text(f"eval_only: true\ncontinue_from: {tmp_path / 'run'}\neval_tokens: 500\n")
    assert torchrun_main.command_line(["--config", str(tmp_path / "c.yaml")]) == 0
    assert "on 500 validation tokens" in capsys.readouterr().out


def test_the_names_of_flags_have_dashes_or_underscores():
    assert REQUIRED[0] == "--model_config"
    args = parse("--total-batch-size", 32, "--num_training-steps=5", "--no_weight-quant")
    assert (args.total_batch_size, args.num_training_steps, args.weight_quant) == (32, 5, False)
    assert "unknown flag --total-batch-sizes (did you mean --total_batch_size?)" in flags_refusal(
        "--total-batch-sizes", 3
    )
