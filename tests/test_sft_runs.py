"""Runs of --task sft: begun with a transformers folder, cut in two, on two ranks, in epochs, quantized, exported."""

import json

import pytest
import torch
from support.command_line import refusal
from support.dialogues import CHATML, sums, turns, write_dialogues
from support.ranks import run_on_two_ranks
from support.resumed_runs import INT8, LOW_RANK, assert_halves_make_a_whole
from support.runs import ROOT, losses, record, run
from support.tuned import Tuned, make_tuned
from transformers import AutoModelForCausalLM, AutoTokenizer

import torchrun_main
from peft_pretraining.checkpoint.weights import load_initial_weights
from peft_pretraining.export.__main__ import command_line as export
from peft_pretraining.multiple_choice import open_model

QLORA = dict(optimizer="adamw", peft="lora", rank=8, weight_quant=True, weight_bits=4, weight_group_size=16)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Tuned:
    return make_tuned(tmp_path_factory.mktemp("tuned"))


@pytest.mark.parametrize("packing", ["whole", "truncate"])
def test_interrupted_in_mid_epoch_n_and_n_updates_are_2_n(tuned, tmp_path, packing):
    method = dict(optimizer="q_galore_adamw8bit", **LOW_RANK, **INT8) if packing == "whole" else dict(optimizer="adamw")
    assert_halves_make_a_whole(tuned, tmp_path, packing=packing, **method)
    values = losses(tmp_path / "whole")
    assert values[-1] < values[0] - 1, "it learns"


def test_quantized_adapters_go_on_exactly_too(tuned, tmp_path):
    assert_halves_make_a_whole(tuned, tmp_path, **QLORA)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_have_the_losses_of_one(tuned, tmp_path, parallel):
    flags = dict(num_training_steps=4, optimizer="galore_adamw", rank=8, proj_type="right")
    run(tuned, tmp_path / "one", **flags)
    done = run_on_two_ranks(tuned.flags(tmp_path / "two", **flags | dict(batch_size=2, parallel=parallel)))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)


def test_model_and_tokenizer_are_those_of_the_folder_and_epochs_make_the_length(tuned, tmp_path):
    flags = dict(model_config=None, tokenizer=None, num_training_steps=None, packing="truncate", batch_size=30)
    run(tuned, tmp_path / "run", num_train_epochs=1.5, **flags)
    assert len(losses(tmp_path / "run")) == 6, "120 dialogues, 30 an update, one and a half times"
    (start,) = record(tmp_path / "run", "start")
    assert start["args"]["num_training_steps"] == 6 and start["args"]["warmup_steps"] == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template == CHATML


def test_a_given_number_of_updates_wins_over_epochs(tuned, tmp_path):
    run(tuned, tmp_path / "run", num_training_steps=2, num_train_epochs=3)
    assert len(losses(tmp_path / "run")) == 2


def test_weights_are_quantized_while_they_are_read(tuned):
    """INT8 from the first moment: what the folder holds, rounded to nearest, and no other copy."""
    from peft_pretraining.cli.args import parse_args
    from peft_pretraining.model.build import prepare_model
    from peft_pretraining.model.config import read_config
    from qgalore.storage.quantized_weight import QuantizedWeight

    for flags in (dict(optimizer="q_galore_adamw8bit", **LOW_RANK, **INT8), QLORA):
        args = parse_args(tuned.flags(tuned.base / "unused", **flags))
        config = read_config(tuned.base / "config.json")
        model = prepare_model(args, config=config, dtype=torch.float32, device=torch.device("cpu"))
        load_initial_weights(model, tuned.base)
        theirs = dict(AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32).named_parameters())
        quantized = {
            n.replace(".base_layer", ""): p for n, p in model.named_parameters() if isinstance(p, QuantizedWeight)
        }
        assert len(quantized) == 14
        for name, weight in quantized.items():
            step = weight.scale.max().item()
            assert 0 < (weight.dequantize() - theirs[name]).abs().max() <= step / 2 * 1.001


def test_lora_trains_its_factors_alone_and_leaves_as_a_model_and_as_adapters(tuned, tmp_path, capsys):
    from peft import PeftModel

    flags = dict(optimizer="adamw", peft="lora", rank=8, lr=0.03)
    run(tuned, tmp_path / "run", **flags)
    (start,) = record(tmp_path / "run", "start")
    trained = {group["name"]: group["trained_by"] for group in start["groups"]}
    assert trained == {
        "attention and MLP": "AdamW, LoRA, rank 8, alpha 32",
        "frozen": "nothing: W0 of the adapters, embedding, norms and head",
    }
    assert export([str(tmp_path / "run"), str(tmp_path / "adapters"), "--adapters"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tuned.base, dtype=torch.float32)
    ids = torch.arange(50)[None]
    with torch.no_grad():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapters")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)(ids).logits
    assert (adapted - merged).abs().max() < 1e-5 < 0.1 < (adapted - before).abs().max()
    run(tuned, tmp_path / "full", optimizer="adamw", num_training_steps=1)
    capsys.readouterr()
    message = refusal([tmp_path / "full", tmp_path / "none", "--adapters"], capsys, program=export)
    assert "--adapters is for runs of --peft lora --freeze_others" in message and not (tmp_path / "none").exists()


def test_qlora_keeps_4_bits_and_exports_what_it_computes(tuned, tmp_path, capsys):
    run(tuned, tmp_path / "run", **QLORA)
    (start,), (end,) = record(tmp_path / "run", "start"), record(tmp_path / "run", "end")
    assert start["groups"][-1]["trained_by"].startswith("nothing: W0 of the adapters in INT4, ")
    elements = {group["name"]: group["elements"] for group in start["groups"]}
    matrices = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    plain = 4 * (elements["frozen"] - matrices + elements["attention and MLP"])
    assert end["kept_bytes"]["weights"] == plain + matrices // 2
    assert export([str(tmp_path / "run"), str(tmp_path / "out"), "--verify"]) == 0
    capsys.readouterr()
    model, _ = open_model(tmp_path / "run", device=torch.device("cpu"), dtype=torch.float32)
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name


def test_all_but_the_matrices_can_stay_as_they_are(tuned, tmp_path):
    """Also of GaLore: they have no moments, and a run goes on without them."""
    method = dict(optimizer="q_galore_adamw8bit_per_layer", freeze_others=True, **LOW_RANK, **INT8)
    assert_halves_make_a_whole(tuned, tmp_path, **method)
    (start,) = record(tmp_path / "whole", "start")
    assert [group["name"] for group in start["groups"]] == ["attention and MLP", "frozen"]
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).named_parameters())
        for folder in (tuned.base, tmp_path / "whole" / "model")
    )
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "self_attn" not in name and "mlp" not in name}


def test_dialogues_that_are_too_long_are_counted(tuned, tmp_path):
    data = tmp_path / "data" / "train.jsonl"
    long = {"messages": turns("user", "x" * 200, "assistant", "y")}
    two = {"messages": turns("user", "x", "assistant", "y", "user", "x" * 200, "assistant", "z")}
    write_dialogues(data, [*sums(30), long, two])
    run(tuned, tmp_path / "run", dataset=data, validation=tuned.data, packing="truncate", batch_size=16)
    counts = [(line["shortened"], line["left_out"]) for line in record(tmp_path / "run", "too_long")]
    assert counts == sorted(counts) and counts[-1][0] >= 2 and counts[-1][1] >= 2, "three epochs have been begun"


def test_a_checkpoint_of_dialogues_is_evaluated_on_dialogues(tuned, tmp_path, capsys):
    run(tuned, tmp_path / "run", num_training_steps=2)
    (expected,) = record(tmp_path / "run", "eval")
    capsys.readouterr()
    assert torchrun_main.command_line(["--eval_only", "--continue_from", str(tmp_path / "run"), "--workers", "0"]) == 0
    assert f"loss {expected['loss']:.6f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"packing": "concat"}, "--packing concat with --task sft: dialogues would see each other"),
        ({"task": None, "packing": "whole"}, "--packing whole is for the dialogues of --task sft"),
        ({"task": None, "num_train_epochs": 2}, "--num_train_epochs 2 is for --task sft"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0"),
        ({"dataset": "c4"}, "c4 holds texts, and --task sft needs dialogues"),
        ({"tokenizer": None, "continue_from": None}, "--task sft needs --tokenizer, or --continue_from"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_one_line_and_nothing_begun(tuned, tmp_path, capsys, flags, message):
    assert message in refusal(tuned.flags(tmp_path / "out", **flags), capsys)
    assert not list(tmp_path.glob("out/*"))


def test_a_text_is_no_dialogue(tuned, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    message = refusal(tuned.flags(tmp_path / "out", dataset=path, validation=path), capsys)
    assert f"{path} line 1: no dialogue (fields: text)" in message


def test_commands_of_the_page_run(tuned, tmp_path):
    """As they stand there, with shorter arguments after them."""
    page = (ROOT / "docs" / "finetuning.md").read_text()
    commands = [line.split() for line in page.splitlines() if "torchrun_main.py --task sft" in line]
    assert len(commands) == 2
    for number, words in enumerate(commands):
        more = tuned.flags(tmp_path / str(number), model_config=None, tokenizer=None, num_training_steps=2)
        assert torchrun_main.command_line([*words[words.index("torchrun_main.py") + 1 :], *more]) == 0
        assert len(losses(tmp_path / str(number))) == 2


@pytest.mark.slow
def test_compiled_packed_dialogues_have_the_losses_of_eager_ones(tuned, tmp_path):
    run(tuned, tmp_path / "eager", optimizer="adamw", activation_checkpointing=True)
    run(tuned, tmp_path / "compiled", optimizer="adamw", activation_checkpointing=True, compile=True)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-3)
