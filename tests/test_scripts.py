"""Every script and every command of the README and of the pages for users, run with shortened arguments.

The main script runs in this process, because importing torch takes seconds; one command starts torchrun for real.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from support.classifiers import make_classifier, write_task
from support.run_records import whole_run
from support.runs import ROOT, record, shell
from support.tuned import make_tuned

import torchrun_main
from peft_pretraining.cli.args import parse_args
from peft_pretraining.data.token_shards import read_index
from peft_pretraining.glue.__main__ import command_line as run_glue
from peft_pretraining.report.__main__ import main as report
from scripts import tokenize_corpus, train_tokenizer, train_with_trainer

PRETRAIN = sorted((ROOT / "scripts" / "pretrain_c4").glob("*.sh"))
PUBLISHED = {  # Zhao et al. 2024, table 2 and its scripts: rank, lr, updates, warm-up, gap
    "60m": (128, 0.01, 10_000, 1_000, 200),
    "130m": (256, 0.01, 20_000, 2_000, 200),
    "350m": (256, 0.01, 60_000, 6_000, 200),
    "1b": (1024, 0.01, 100_000, 10_000, 200),
    "7b": (1024, 0.005, 150_000, 15_000, 500),
}


PAGES = ("README.md", *(f"docs/{name}.md" for name in ("presets", "optimizers", "data", "checkpoints", "metrics")))


def readme_commands() -> list[str]:
    """Those of README.md first; each once."""
    blocks = [b for page in PAGES for b in re.findall(r"``bash\n(.*?)``", (ROOT / page).read_text(), flags=re.DOTALL)]
    return list(dict.fromkeys(line for block in blocks for line in block.splitlines() if line.strip()))


def first_torchrun() -> str:
    """The command that is run by torchrun itself."""
    return next(command for command in readme_commands() if command.startswith("torchrun"))


def shortened(tiny, save_dir) -> list[str]:
    """Overrides that make any command a run of two updates on the tiny model."""
    return tiny.flags(save_dir, batch_size=2, total_batch_size=4, num_training_steps=2, warmup_steps=1, rank=4)


@pytest.fixture
def words_of(tmp_path):
    """What a script passes to torchrun: one of our own prints it."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "NPROC": "4"}

    def words(command: list[str]) -> list[str]:
        result = shell(command, **environment)
        assert result.returncode == 0, result.stderr
        words = result.stdout.splitlines()
        assert words[:4] == ["--standalone", "--nproc_per_node", "4", "torchrun_main.py"]
        return words[4:]

    return words


def check_a_comparison(command: str, tmp_path) -> None:
    """A page of three runs, whose records are made up here."""
    words = [str(tmp_path / word) if word.startswith(("runs/", "report.")) else word for word in command.split()[3:]]
    for folder in words[:3]:
        whole_run(Path(folder), updates=20, optimizer=Path(folder).name)
    assert report(words) == 0 and "<h1>3 runs</h1>" in (tmp_path / "report.html").read_text()


def check_the_trainer(command: str, tmp_path) -> None:
    """It trains on a text file and leaves a model that transformers loads."""
    (tmp_path / "book.txt").write_text("It was a dark and stormy night; the rain fell in torrents. " * 60)
    words = [str(tmp_path / word) if word in ("book.txt", "runs/trainer") else word for word in command.split()[2:]]
    assert train_with_trainer.main([*words, "--steps", "2"]) == 0
    assert (tmp_path / "runs" / "trainer" / "model" / "model.safetensors").exists()


def check_a_classifier(command: str, tmp_path) -> None:
    """It trains on a local model and files, and leaves its scores."""
    folder = write_task(tmp_path / "files", "mrpc")
    local = {"model_name_or_path": make_classifier(tmp_path / "roberta", "roberta"), "output_dir": tmp_path / "mrpc"}
    local |= {"train_file": folder / "train.csv", "validation_file": folder / "validation.csv", "num_train_epochs": 1}
    more = [str(part) for name, value in local.items() for part in (f"--{name}", value)]
    assert run_glue([*command.split()[3:], *more]) == 0
    assert "eval_f1" in json.loads((tmp_path / "mrpc" / "all_results.json").read_text())


@pytest.mark.parametrize("script", PRETRAIN, ids=lambda path: path.stem)
def test_pretraining_scripts_carry_the_published_settings(script, words_of):
    args = parse_args(words_of(["bash", str(script), "--seed", "7"]))
    size = script.stem.removeprefix("llama_")
    published = (args.rank, args.lr, args.num_training_steps, args.warmup_steps, args.update_proj_gap)
    assert published == PUBLISHED[size]
    assert args.model_config == f"configs/llama_{size}.json" and args.total_batch_size == 512
    assert args.galore_scale == 0.25 and args.seed == 7, "arguments are passed on"


@pytest.mark.parametrize("script", PRETRAIN, ids=lambda path: path.stem)
def test_pretraining_scripts_run(script, tiny, tmp_path, words_of):
    assert torchrun_main.command_line(words_of(["bash", str(script), *shortened(tiny, tmp_path)])) == 0
    (end,) = record(tmp_path, "end")
    assert end["updates"] == 2 and end["tokens_seen"] == 2 * 4 * 32


@pytest.mark.parametrize("command", [c for c in readme_commands() if not c.startswith("bash scripts/t")])
def test_readme_commands_run(command, tiny, tmp_path, words_of, capsys):
    """As they stand there, with shorter arguments after them; `scripts/test.sh` is what runs this."""
    if "train_with_trainer" in command:
        check_the_trainer(command, tmp_path)
        return
    if "runs/60m" in command and "--save_dir" not in command:
        check_a_command_on_a_finished_run(command, tiny, tmp_path)
        return
    if "run_glue" in command:
        check_a_classifier(command, tmp_path)
        return
    if "train_tokenizer" in command:
        more = ["--dataset", tiny.data, "--vocab_size", 300, "--output", tmp_path / "own.model"]
        assert train_tokenizer.command_line([*command.split()[2:], *map(str, more)]) == 0
        return
    if "peft_pretraining.report" in command:
        check_a_comparison(command, tmp_path)
        return
    words, more = command.split(), shortened(tiny, tmp_path / "run")
    if "--task sft" in command:
        more = make_tuned(tmp_path / "tuned").flags(tmp_path / "run", num_training_steps=2)
    if "--config" in words:
        words[words.index("--config") + 1] = str(config_of(command, tiny, tmp_path))
    if words[0] == "bash" and "quickstart" not in command:
        assert torchrun_main.command_line(words_of([*words, *more])) == 0
    elif "torchrun_main.py" in words and command != first_torchrun():
        assert torchrun_main.command_line([*words[words.index("torchrun_main.py") + 1 :], *more]) == 0
    elif "tokenize_corpus" in command:
        more = ["--dataset", tiny.data, "--tokenizer", tiny.tokenizer, "--output", tmp_path / "tokens"]
        assert tokenize_corpus.command_line([*words[2:], *map(str, more)]) == 0
    else:
        if "quickstart" in command:  # its own model and data, the embedded ones; the whole of it is the slow test below
            more = ["--num_training_steps", "10", "--warmup_steps", "1", "--save_dir", str(tmp_path / "run")]
        if command == first_torchrun():
            more = [word for word in more if word != "--no_report"]  # its line is in the README
        result = shell([*words, *more], VENV=sys.prefix, timeout=240)
        assert result.returncode == 0, result.stderr
        if command == first_torchrun():
            check_the_lines_it_prints(result.stderr)
    if "tokenize_corpus" in command:
        assert read_index(tmp_path / "tokens").count("train")["documents"] == 600
    elif "--dry_run" in command:
        assert "how each group of parameters is trained" in capsys.readouterr().err
    else:
        assert record(tmp_path / "run", "end")[0]["updates"] in (2, 10)


def check_the_lines_it_prints(printed: str) -> None:
    """Each line below the command in the README is one of the run's, but for numbers and the folder."""
    (block,) = re.findall(r"```text\n(\d\d:.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    shapes = {shape_of(line) for line in printed.splitlines()}
    assert block.count("\n") > 3
    assert not [line for line in block.splitlines() if shape_of(line) not in shapes]


def shape_of(line: str) -> str:
    return re.sub(r"\d[\d.,:]*(e[+-]?\d+)?", "0", re.sub(r"\S+/(?=metrics.jsonl|model$|report.html)", "", line))


def config_of(command: str, tiny, folder: Path) -> Path:
    """The file of a command with --config: that of docs/presets.md, or of a finished run."""
    if "config.yaml" in command:
        assert torchrun_main.command_line(tiny.flags(folder / "finished")) == 0
        return folder / "finished" / "config.yaml"
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "presets.md").read_text(), flags=re.DOTALL)
    (folder / "own.yaml").write_text(text)
    return folder / "own.yaml"


def check_a_command_on_a_finished_run(command: str, tiny, folder) -> None:
    assert torchrun_main.command_line(tiny.flags(folder / "runs" / "60m")) == 0
    command = command.removeprefix("torchrun --standalone").removeprefix("python")
    result = shell([sys.executable, *command.replace("runs/60m", f"{folder}/runs/60m").split()])
    assert result.returncode == 0, result.stderr
    if "--eval_only" in command:
        perplexity = record(folder / "runs" / "60m", "end")[0]["perplexity"]
        assert f"perplexity {perplexity:.4f}" in result.stdout
    else:
        assert (folder / "runs" / "60m-hf" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    """The quickstart, whole: perplexity at the end is under half of that after 10 updates."""
    result = shell(["bash", "scripts/quickstart.sh", "--save_dir", str(tmp_path)], VENV=sys.prefix, timeout=600)
    assert result.returncode == 0, result.stderr
    evaluations = {line["update"]: line["perplexity"] for line in record(tmp_path, "eval")}
    assert record(tmp_path, "end")[0]["perplexity"] < evaluations[10] / 2


def test_the_documents_name_tests_that_exist():
    """docs/ points at tests as path::name; each is there."""
    for page in (ROOT / "docs").glob("*.md"):
        for path, name in re.findall(r"`(tests/\w+\.py)::(\w+)`", page.read_text()):
            assert f"def {name}(" in (ROOT / path).read_text(), f"{page.name}: {path}::{name}"


def test_the_page_names_every_event_and_its_fields(tiny, tmp_path):
    """The table of metrics.jsonl is the record's: no field is missing there."""
    assert torchrun_main.command_line(tiny.flags(tmp_path)) == 0
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "metrics.md").read_text(), flags=re.MULTILINE))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        fields = json.loads(line)
        assert not [name for name in fields.keys() - {"event"} if not re.search(rf"\b{name}\b", rows[fields["event"]])]


MULTI_GPU = sorted((ROOT / "scripts" / "multi_gpu").glob("*.sh"))


@pytest.mark.parametrize("script", MULTI_GPU, ids=lambda path: path.stem)
def test_scripts_for_several_gpus(script, tmp_path):
    """With stand-ins for torchrun, srun and scontrol: what torchrun is told, and the program's own flags."""
    stand_ins = {
        "torchrun": 'for a in "$@"; do echo "$a"; done',
        "srun": 'shift; "$@"',
        "scontrol": "echo node1; echo node2",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    told = {"HOST": "node1", "NODES": "1:2", "NPROC": "4", "SLURM_JOB_NODELIST": "node[1-2]"}
    told |= {"SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    result = shell(["bash", str(script), "--parallel", "fsdp"], PATH=f"{tmp_path}:/usr/bin:/bin", **told)
    assert result.returncode == 0, result.stderr
    words = result.stdout.splitlines()
    ours = words.index("torchrun_main.py")
    args = parse_args(words[ours + 1 :], world_size=8)
    assert (args.parallel, args.resume, args.gradient_accumulation) == ("fsdp", "auto", 4)
    launch = dict(zip(words[:ours], words[1:ours], strict=False))
    assert launch["--nproc_per_node"] == "4" and launch["--max-restarts"] == "3"
    if script.stem != "one_node":
        assert launch["--rdzv_endpoint"] == "node1:29500" and launch["--rdzv_backend"] == "c10d"
        assert launch["--nnodes"] == {"several_nodes": "1:2", "slurm": "2"}[script.stem]
