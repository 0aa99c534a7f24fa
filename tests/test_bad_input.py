"""What cannot be meant gets one line that says what was wrong and what to do, status 2, and nothing before it."""

import json

import pytest
from support.command_line import refusal
from support.runs import ROOT, losses, shell, torchrun

import torchrun_main


def write_lines(path, *lines: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"optimizer": "galore_adam"}, "unknown --optimizer 'galore_adam'. Did you mean galore_adamw? Known: adam, "),
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"lr": -0.1}, "--lr -0.1: must be above 0"),
        ({"total_batch_size": 6}, "--total_batch_size 6 is not a multiple of --batch_size 4 x 1 process. Try 4 or 8."),
        ({"model_config": "configs/llama_8m.json"}, "llama_9m.json"),
        ({"max_length": 65}, "--max_length 65"),
        ({"dataset": "no/such/folder"}, "no such file or folder: no/such/folder"),
        ({"tokenizer": "no/such.model"}, "no/such.model"),
        ({"continue_from": "no/such/run"}, "no/such/run: there is no such folder"),
        ({"allow_changed": "lr,rnak"}, "--allow_changed rnak: there is no flag of that name"),
        ({"eval_only": True}, "--eval_only needs --continue_from"),
        ({"batch_size": None}, "the following arguments are required: --batch_size"),
        ({"dtype": "float16"}, "unknown --dtype 'float16'"),
        ({"warmup_steps": 7}, "--warmup_steps 7"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_one_line_and_nothing_begun(tiny, tmp_path, capsys, flags, message):
    assert message in refusal(tiny.flags(tmp_path / "out", **flags), capsys)
    assert not list(tmp_path.glob("out/*")), "nothing was written"


def test_a_broken_config_names_line_and_column(tiny, tmp_path, capsys):
    config = write_lines(tmp_path / "broken.json", '{"hidden_size": 32,', '"vocab_size" 60}')
    message = refusal(tiny.flags(tmp_path / "out", model_config=config), capsys)
    assert str(config) in message and "line 2, column 14" in message


def test_a_source_without_a_readable_document_names_file_and_line(tiny, tmp_path, capsys):
    broken = write_lines(tmp_path / "data" / "train-0.jsonl", *['{"text": "ba" "de"}'] * 3)
    write_lines(tmp_path / "data" / "validation-0.jsonl", json.dumps({"text": "ba de fi go"}))
    message = refusal(tiny.flags(tmp_path / "out", dataset=broken.parent), capsys)
    assert f"{broken} line 1: not valid JSON (Expecting ',' delimiter at column 15)" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_line_does_not_end_a_run(tiny, tmp_path, workers):
    lines = [json.dumps({"text": f"ba de fi go {i}"}) for i in range(20)]
    write_lines(tmp_path / "data" / "train-0.jsonl", *lines[:17], '{"text": "ba" "de"}', *lines[17:])
    write_lines(tmp_path / "data" / "validation-0.jsonl", *lines)
    flags = tiny.flags(tmp_path / "out", dataset=tmp_path / "data", num_training_steps=8, workers=workers)
    assert torchrun_main.command_line(flags) == 0
    assert len(losses(tmp_path / "out")) == 8


@pytest.mark.parametrize("content", ["", "\n\n"], ids=["no lines", "blank lines"])
def test_an_empty_dataset(tiny, tmp_path, capsys, content):
    (tmp_path / "train.jsonl").write_text(content)
    message = refusal(tiny.flags(tmp_path / "out", dataset=tmp_path / "train.jsonl"), capsys)
    assert ("no document" if content else "empty files") in message and "train.jsonl" in message


def test_a_tokenizer_too_large_for_the_model(tiny, tmp_path, capsys):
    config = json.loads(tiny.config.read_text()) | {"vocab_size": tiny.vocab_size - 1}
    small = write_lines(tmp_path / "small.json", json.dumps(config))
    message = refusal(tiny.flags(tmp_path / "out", model_config=small), capsys)
    assert str(tiny.vocab_size) in message and str(tiny.vocab_size - 1) in message


@pytest.mark.parametrize("save_dir", ["file/inside", "/proc/qgalore"])
def test_a_folder_that_cannot_be_written(tiny, tmp_path, capsys, save_dir):
    (tmp_path / "file").touch()
    message = refusal(tiny.flags(tmp_path / save_dir), capsys)
    assert "--save_dir" in message and "cannot be written" in message


def test_bfloat16_on_a_device_without_it(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("peft_pretraining.model.dtypes.native_bfloat16", lambda device: False)
    assert "Use --dtype float32" in refusal(tiny.flags(tmp_path / "out", dtype="bfloat16"), capsys)


def test_compiling_without_a_compiler(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("peft_pretraining.model.build.shutil.which", lambda name: None)
    assert "--compile needs a C++ compiler" in refusal(tiny.flags(tmp_path / "out", compile=True), capsys)


@pytest.mark.parametrize("missing", ["c4", "tokenizer"])
def test_a_hub_that_cannot_be_reached_names_the_offline_ways(tiny, tmp_path, missing):
    more = {"dataset": "c4"} if missing == "c4" else {"tokenizer": None}
    command = ["python", "torchrun_main.py", *tiny.flags(tmp_path / "out", **more)]
    result = shell(command, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"), timeout=60)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "cannot be reached" in last
    assert "pydocs" in last and ("--dataset PATH" in last or ".model" in last)


def test_two_ranks_say_it_once(tiny, tmp_path):
    result = torchrun(tiny.flags(tmp_path / "out", optimizer="sdg"), processes=2)
    assert result.returncode != 0
    said, _, page = result.stderr.partition("ChildFailedError")
    assert said.count("unknown --optimizer 'sdg'. Did you mean sgd?") == 1
    assert_torchrun_ends_with(page, "error: unknown --optimizer 'sdg'. Did you mean sgd?")


def assert_torchrun_ends_with(page: str, line: str) -> None:
    """torchrun's page on the failure has our line as its cause, at its end."""
    *_, cause, border = page.rstrip().splitlines()
    assert cause.startswith(f"  traceback : {line}") and set(border) == {"="}, page


@pytest.mark.slow
def test_torchrun_shows_our_line_at_the_end_of_its_page(tiny, tmp_path):
    result = torchrun(tiny.flags(tmp_path / "out", rank=0))
    assert_torchrun_ends_with(result.stderr, "error: --rank 0: must be at least 1.")
    assert "new message format" not in result.stderr, "written as torchrun itself would"


def test_core_packages_are_enough_for_local_text(tiny, tmp_path):
    """Without wandb, datasets, pyarrow and the hub's client: a GPU machine with no network runs just that."""
    absent = ("wandb", "datasets", "pyarrow", "pandas")
    code = (
        f"import sys; sys.modules.update({{name: None for name in {absent}}}); "
        "import torchrun_main; sys.exit(torchrun_main.command_line(sys.argv[1:]))"
    )
    result = shell(["python", "-c", code, *tiny.flags(tmp_path / "out", num_training_steps=2)])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    assert (ROOT / "requirements.txt").exists()
