"""SAVE_DIR/model and the export are one thing, and a run carries its tokenizer with it."""

import json
import shutil

import pytest
import torch
from support.command_line import refusal
from support.runs import record, run
from support.tokenizers import make_bpe_folder, train_sentencepiece
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import torchrun_main
from peft_pretraining.checkpoint.files import Checkpoint
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.export.__main__ import command_line as export


@pytest.mark.parametrize(
    "flags", [{}, {"optimizer": "q_galore_adamw8bit", "weight_quant": True, "rank": 8}], ids=["", "INT8"]
)
def test_the_model_of_a_run_is_what_the_export_writes(tiny, tmp_path, flags):
    run(tiny, tmp_path, **flags)
    assert export([str(tmp_path), str(tmp_path / "exported")]) == 0
    names = sorted(path.name for path in (tmp_path / "exported").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "model").iterdir())
    assert {"tokenizer.json", "tokenizer.model", "generation_config.json"} < set(names)
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "exported" / name).read_bytes(), name


def test_it_loads_and_knows_its_special_tokens(tiny, tmp_path):
    """As a tokenizer with other ids than LLaMA's defaults has them; generation ends at its end of sequence."""
    model = train_sentencepiece(tmp_path / "own.model", bos_id=3, eos_id=0, unk_id=1, pad_id=-1)
    config = json.loads(tiny.config.read_text()) | {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run(tiny, tmp_path / "run", tokenizer=model, model_config=tmp_path / "config.json")
    folder = tmp_path / "run" / "model"
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id, loaded.config.use_cache) == (3, 0, True)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (3, 0)
    assert tokenizer("the cat sat")["input_ids"] == load_tokenizer(str(model)).encode(["the cat sat"])[0]
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert loaded.generate(torch.tensor([[5]]), max_new_tokens=3).shape[1] <= 4


@pytest.mark.parametrize("make", [
    lambda folder: train_sentencepiece(folder / "own.model"), lambda folder: make_bpe_folder(folder / "own")
], ids=["sentencepiece", "transformers"])  # fmt: skip
def test_a_checkpoint_needs_nothing_of_the_place_it_was_made_in(tiny, tmp_path, monkeypatch, capsys, make):
    """Moved to another folder, its tokenizer gone, it is exported, evaluated and gone on from."""
    home, other = tmp_path / "home", tmp_path / "other"
    home.mkdir(), other.mkdir()
    tokenizer = make(home)
    config = json.loads(tiny.config.read_text()) | {"vocab_size": 400}
    (home / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(home)
    flags = dict(tokenizer=tokenizer.relative_to(home), model_config="config.json", save_every=3)
    run(tiny, home / "run", **flags)
    shutil.move(home / "run" / "checkpoint-00000006", other)
    tokenizer.rename(other / tokenizer.name)
    monkeypatch.chdir(other)
    assert export(["checkpoint-00000006", "exported"]) == 0
    assert "left out" not in capsys.readouterr().err
    evaluated = ["--eval_only", "--continue_from", "checkpoint-00000006", "--batch_size", "4"]  # rounded as in the run
    assert torchrun_main.command_line(evaluated) == 0
    assert f"perplexity {record(home / 'run', 'end')[0]['perplexity']:.4f}" in capsys.readouterr().out
    assert (
        Checkpoint.open(other / "checkpoint-00000006").verify().tokenizer == other / "checkpoint-00000006" / "tokenizer"
    )
    # The same bytes in another place are the same tokenizer.
    early = dict(flags, tokenizer=other / tokenizer.name, model_config=home / "config.json")
    run(tiny, other / "more", continue_from=home / "run" / "checkpoint-00000003", **early)


def test_a_tokenizer_that_has_changed_is_refused(tiny, tmp_path, capsys):
    """Under the same path; not where it is allowed."""
    model = train_sentencepiece(tmp_path / "own.model")
    config = json.loads(tiny.config.read_text()) | {"vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = dict(tokenizer=model, model_config=tmp_path / "config.json", save_every=3)
    run(tiny, tmp_path / "run", **flags)
    train_sentencepiece(tmp_path / "own.model", add_dummy_prefix=False)
    more = tiny.flags(tmp_path / "more", continue_from=tmp_path / "run" / "checkpoint-00000003", **flags)
    said = refusal(more, capsys)
    assert "gives other ids than the one" in said and "--allow_changed tokenizer" in said
    assert torchrun_main.command_line([*more, "--allow_changed", "tokenizer"]) == 0
