"""`python -m peft_pretraining.run_glue`: every task, model and method, and a run that goes on, on files made here."""

import argparse
import json
import os
import shlex
import signal

import pytest
import torch
from support.classifiers import make_classifier, make_rows, write_rows, write_task
from support.command_line import message_of
from support.runs import ROOT, record, shell, torchrun
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_pretraining.glue import args as glue_args
from peft_pretraining.glue import data as glue_data
from peft_pretraining.glue.__main__ import command_line
from peft_pretraining.glue.batches import Encoded
from peft_pretraining.glue.data import load_examples
from peft_pretraining.glue.evaluate import Judge, evaluate
from peft_pretraining.glue.methods import METHODS, chosen_layers
from peft_pretraining.glue.tasks import TASKS
from peft_pretraining.training import loop

GALORES_README = """python run_glue.py
    --model_name_or_path roberta-base --task_name mrpc --enable_galore --lora_all_modules --max_length 512 --seed=1234
    --lora_r 4 --galore_scale 4 --per_device_train_batch_size 16 --update_proj_gap 500 --learning_rate 3e-5
    --num_train_epochs 30 --output_dir results/ft/roberta_base/mrpc"""
METRICS = {"cola": {"matthews_correlation"}, "stsb": {"pearson", "spearmanr"}} | dict.fromkeys(
    ("mrpc", "qqp"), {"accuracy", "f1"}
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of each kind and all tasks of GLUE."""
    folder = tmp_path_factory.mktemp("glue")
    for kind in ("bert", "roberta", "llama"):
        make_classifier(folder / kind, kind)
    make_classifier(folder / "headed", "bert", head=True)
    for task in TASKS:
        write_task(folder / "glue" / task, task)
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def flags(out, **more: object) -> list[str]:
    """A command line of a few updates. A flag with True is a switch; None leaves a flag out."""
    given = {
        "model_name_or_path": "roberta", "task_name": "rte", "lora_all_modules": True, "lora_r": 4, "no_report": True,
        "learning_rate": 1e-3, "num_train_epochs": 1, "output_dir": out,
    } | more  # fmt: skip
    return [
        part for name, value in given.items() if value is not None
        for part in ([f"--{name}"] + [str(value)] * (value is not True))
    ]  # fmt: skip


def results(out) -> dict:
    return json.loads((out / "all_results.json").read_text())


def losses(out) -> list[float]:
    return [line["loss"] for line in record(out, "update")]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_on_files_of_its_schema(task, tmp_path):
    assert command_line(flags(tmp_path, task_name=task, method="galore")) == 0
    found = {name.removeprefix("eval_") for name in results(tmp_path) if name.startswith("eval_")}
    wanted = METRICS.get(task, {"accuracy"})
    assert wanted <= found and len(losses(tmp_path)) == 3
    (scores,) = record(tmp_path, "scores")
    assert list(scores["splits"]) == list(TASKS[task].evaluations)
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path).config
    assert config.num_labels == max(1, len(TASKS[task].labels))
    if TASKS[task].labels:
        assert tuple(config.id2label[number] for number in range(config.num_labels)) == TASKS[task].labels


@pytest.mark.parametrize("model, method", [
    pytest.param(model, method, marks=[] if model == "roberta" or method in ("q_galore", "lora") else pytest.mark.slow)
    for model in ("bert", "roberta", "llama") for method in METHODS
])  # fmt: skip
def test_what_is_saved_is_what_was_judged(model, method, tmp_path, place):
    """transformers loads the folder, and its logits give the loss and the metrics of the record."""
    assert command_line(flags(tmp_path, model_name_or_path=model, method=method, gradient_accumulation_steps=2)) == 0
    (end,) = record(tmp_path, "end")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows = make_rows("rte", 12, seed=2)
    examples = [glue_data.Example((row["sentence1"], row["sentence2"]), row["label"]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    data = Encoded(examples, tokenizer=tokenizer, max_length=128, pad_to=None)
    again = evaluate(saved, data, metrics=("accuracy",), batch_size=5, world=glue_world())
    assert again["loss"] == pytest.approx(end["last"]["splits"]["validation"]["loss"], rel=1e-5)
    assert again["accuracy"] == end["last"]["splits"]["validation"]["accuracy"] == results(tmp_path)["eval_accuracy"]
    before = AutoModelForSequenceClassification.from_pretrained(place / model)
    moved = any(not torch.equal(a, b) for a, b in zip(before.base_model.parameters(), saved.base_model.parameters(),
        strict=True))  # fmt: skip
    assert moved, "the body was trained, not the classifier alone"


def test_nf4_goes_on_to_the_last_bit_and_is_saved_as_plain_weights(tmp_path, place):
    """bitsandbytes' form of QLoRA's frozen weights, on a CPU, too."""
    pytest.importorskip("bitsandbytes")
    told = dict(method="qlora", qlora_codec="nf4", num_train_epochs=4, checkpointing_steps=3, keep_last=0)
    assert command_line(flags(tmp_path / "whole", **told)) == 0
    middle = tmp_path / "whole" / "checkpoint-00000003"
    assert command_line(flags(tmp_path / "rest", resume_from_checkpoint=middle, **told)) == 0
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[3:]
    (end,) = record(tmp_path / "rest", "end")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rest")
    rows = make_rows("rte", 12, seed=2)
    examples = [glue_data.Example((row["sentence1"], row["sentence2"]), row["label"]) for row in rows]
    data = Encoded(examples, tokenizer=AutoTokenizer.from_pretrained(tmp_path / "rest"), max_length=128, pad_to=None)
    again = evaluate(saved, data, metrics=("accuracy",), batch_size=5, world=glue_world())
    assert again["loss"] == pytest.approx(end["last"]["splits"]["validation"]["loss"], rel=1e-5)
    before = AutoModelForSequenceClassification.from_pretrained(place / "roberta").base_model.state_dict()
    name = "encoder.layer.0.intermediate.dense.weight"
    assert 0 < (saved.base_model.state_dict()[name] - before[name]).abs().max() < 0.1, "rounded to 4 bits, and adapted"


def test_nf4_without_its_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(glue_args, "find_spec", lambda name: None)
    assert command_line(flags(tmp_path, method="qlora", qlora_codec="nf4")) == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err


def glue_world():
    from peft_pretraining.distributed import World

    return World()


def test_methods_differ_in_memory_as_they_should(tmp_path):
    """Between updates; in 4 bits a weight takes half of 8 bits."""
    kept = {}
    for method in METHODS:
        assert command_line(flags(tmp_path / method, method=method, max_train_steps=1)) == 0
        (end,) = record(tmp_path / method, "end")
        kept[method] = end["kept_bytes"]
        assert end["memory_bytes"] > 0 and end["micro_batch_seconds"] > 0
    total = {method: sum(kinds.values()) for method, kinds in kept.items()}
    assert total["q_galore"] < total["galore_8bit"] < total["galore"] < total["full"]
    assert total["qlora"] < total["lora"] < total["full"] and total["full_8bit"] < total["full"]
    assert kept["galore"]["bases"] > kept["q_galore"]["bases"] > 0 == kept["full"]["bases"]


@pytest.mark.parametrize("model, head", [("roberta", "classifier"), ("llama", "score")])
def test_only_matrices_and_the_classifier_in_4_bits(model, head, tmp_path, place):
    """What QLoRA keeps, without its factors; embeddings, norms and the rest stay to the last bit."""
    told = dict(model_name_or_path=model, method="q_galore", weight_bits=4, freeze_others=True)
    assert command_line(flags(tmp_path / "q", **told)) == 0
    assert command_line(flags(tmp_path / "qlora", model_name_or_path=model, method="qlora")) == 0
    kept = {name: record(tmp_path / name, "end")[0]["kept_bytes"] for name in ("q", "qlora")}
    assert kept["q"]["weights"] < kept["qlora"]["weights"] and kept["q"]["scales"] == kept["qlora"]["scales"]
    before = AutoModelForSequenceClassification.from_pretrained(place / model).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {f"{name}.weight" for name in chosen_layers(
        AutoModelForSequenceClassification.from_pretrained(place / model), all_modules=True)}  # fmt: skip
    assert moved == layers | {name for name in before if name.startswith(f"{head}.")}


@pytest.mark.parametrize("told, said", [
    (dict(method="qlora", qlora_codec="nf4", weight_bits=8), "--weight_bits 8"),
    (dict(method="q_galore", weight_bits=5), "--weight_bits 5"),
])  # fmt: skip
def test_bits_that_there_are_not(told, said, tmp_path, capsys):
    assert command_line(flags(tmp_path, **told)) == 2
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_adapters_leave_as_a_folder_of_peft(tmp_path, place):
    peft = pytest.importorskip("peft")
    assert command_line(flags(tmp_path, method="lora")) == 0
    base = AutoModelForSequenceClassification.from_pretrained(place / "roberta", num_labels=2).eval()
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 5, 9, 12, 2]])
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-6)


@pytest.mark.parametrize("method", ["full", "q_galore", "qlora"])
def test_a_run_goes_on_in_mid_epoch_to_the_last_bit(method, tmp_path, place):
    """With dropout, in the middle of the second epoch of 5 updates, from 4 examples in the last one."""
    write_task(place / "glue36" / "rte", "rte", train=36)
    told = dict(method=method, train_file="glue36/rte/train.csv", validation_file="glue36/rte/validation.csv",
        num_train_epochs=3, update_proj_gap=2, checkpointing_steps=7, gradient_accumulation_steps=2,
        per_device_train_batch_size=4)  # fmt: skip
    assert command_line(flags(tmp_path / "whole", **told)) == 0
    middle = tmp_path / "whole" / "checkpoint-00000007"
    assert command_line(flags(tmp_path / "rest", resume_from_checkpoint=middle, **told)) == 0
    assert len(losses(tmp_path / "whole")) == 15
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[7:]
    whole, rest = (AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("whole", "rest"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert results(tmp_path / "rest") == results(tmp_path / "whole")
    assert command_line(flags(tmp_path / "other", resume_from_checkpoint=middle, **told, lora_r=2)) == 2
    assert not (tmp_path / "other" / "metrics.jsonl").exists()


def test_it_learns_and_the_best_evaluation_is_kept(tmp_path, place):
    """A word tells the label: after some epochs almost all are right. The results name the best epoch, not the last."""
    write_task(place / "easy" / "sst2", "sst2", train=160, validation=40)
    told = dict(task_name="sst2", train_file="easy/sst2/train.csv", validation_file="easy/sst2/validation.csv",
        method="galore", num_train_epochs=8, learning_rate=5e-3, per_device_train_batch_size=16)  # fmt: skip
    assert command_line(flags(tmp_path, **told)) == 0
    scores = [line["splits"]["validation"]["score"] for line in record(tmp_path, "scores")]
    assert len(scores) == 8 and max(scores) >= 0.9
    assert results(tmp_path)["best_score"] == max(scores)
    assert results(tmp_path)["best_update"] == 10 * (scores.index(max(scores)) + 1)
    assert results(tmp_path)["eval_accuracy"] == scores[-1]


def test_the_command_line_of_galores_readme(tmp_path, monkeypatch):
    """Unchanged: the model and the data it names lie beside it. Its 30 epochs are of one update here."""
    write_task(tmp_path / "glue" / "mrpc", "mrpc", train=16)
    make_classifier(tmp_path / "roberta-base", "roberta")
    monkeypatch.chdir(tmp_path)
    command = shlex.split(GALORES_README)[2:]
    assert command_line(command) == 0
    out = tmp_path / "results/ft/roberta_base/mrpc"
    assert len(losses(out)) == 30 and {"eval_accuracy", "eval_f1"} <= results(out).keys()
    (start,) = record(out, "start")
    assert start["args"]["optimizer"] == "galore_adamw" and start["args"]["rank"] == 4
    assert [group["trained_by"] for group in start["groups"]][0].endswith("scale 4")
    lrs = [line["lr"] for line in record(out, "update")]
    assert lrs[0] == pytest.approx(3e-5, rel=0.04) and lrs[-1] == pytest.approx(3e-5 / 30)


def test_our_page_has_the_same_line():
    page = (ROOT / "docs" / "finetuning.md").read_text()
    told = page.partition("python -m peft_pretraining.run_glue \\\n")[2].partition("```")[0].replace("\\\n", " ")
    assert sorted(shlex.split(told)) == sorted(shlex.split(GALORES_README)[2:])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full_8bit", "q_galore"])
def test_compiled_updates_are_the_eager_ones(method, tmp_path):
    told = dict(method=method, num_train_epochs=2)
    assert command_line(flags(tmp_path / "eager", **told)) == 0
    assert command_line(flags(tmp_path / "compiled", compile=True, **told)) == 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


@pytest.mark.slow
def test_two_processes_train_on_the_same_examples(tmp_path, place):
    """Without dropout, the losses of one process with twice the batch; the metrics are over all examples."""
    model = make_classifier(tmp_path / "still", "bert", dropout=0.0)
    data = {"train_file": place / "glue/rte/train.csv", "validation_file": place / "glue/rte/validation.csv"}
    told = data | dict(model_name_or_path=model, method="galore", num_train_epochs=2)
    both = flags(tmp_path / "both", per_device_train_batch_size=4, **told)
    result = torchrun(list(map(str, both)), processes=2, script="peft_pretraining.run_glue", options=("-m",))
    assert result.returncode == 0, result.stderr
    assert command_line(flags(tmp_path / "one", per_device_train_batch_size=8, **told)) == 0
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert results(tmp_path / "both")["best_loss"] == pytest.approx(results(tmp_path / "one")["best_loss"], rel=1e-3)


def test_a_signal_ends_it_with_a_checkpoint(tmp_path, monkeypatch):
    """As in every run: the update is finished, the run saved, and `auto` goes on as if nothing had been."""
    told = dict(method="galore", num_train_epochs=2)
    assert command_line(flags(tmp_path / "whole", **told)) == 0
    step = loop.train_step

    def interrupted(run):
        step(run)
        if run.state.update == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", interrupted)
    cut = flags(tmp_path / "cut", resume_from_checkpoint="auto", **told)
    assert command_line(cut) == 75 and not (tmp_path / "cut" / "all_results.json").exists()
    monkeypatch.setattr(loop, "train_step", step)
    assert command_line(cut) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_a_signal_ends_an_evaluation(tmp_path, monkeypatch):
    """The run is saved without its result, and `auto` begins with it."""
    told = dict(method="full", num_train_epochs=2)
    assert command_line(flags(tmp_path / "whole", **told)) == 0
    cut, judge = flags(tmp_path / "cut", resume_from_checkpoint="auto", **told), Judge.evaluate

    def interrupted(self, run):
        os.kill(os.getpid(), signal.SIGTERM)
        judge(self, run)

    with monkeypatch.context() as patch:
        patch.setattr(Judge, "evaluate", interrupted)
        assert command_line(cut) == 75
    assert not record(tmp_path / "cut", "scores")
    assert command_line(cut) == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


@pytest.mark.slow
def test_the_module_is_a_program(place, tmp_path):
    told = " ".join(map(str, flags(tmp_path, model_name_or_path=place / "bert", max_train_steps=1)))
    code = shell(["bash", "-c", f"cd {place} && PYTHONPATH={ROOT} python -m peft_pretraining.run_glue {told}"])
    assert code.returncode == 0, code.stderr
    assert results(tmp_path)["best_update"] == 1


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".json", ".jsonl"])
def test_files_of_ones_own(ending, tmp_path, place):
    """Labels in words; the first two columns are the pair; the classes are in the order of their names."""
    rows = [{"a": row["sentence"], "b": "go hu", "label": ["zebra", "ape"][row["label"]]}
            for row in make_rows("sst2", 16, seed=5)]  # fmt: skip
    train, held_out = (write_rows(tmp_path / f"{name}{ending}", rows) for name in ("train", "held_out"))
    told = dict(task_name=None, train_file=train, validation_file=held_out, model_name_or_path="bert")
    assert command_line(flags(tmp_path / "out", **told)) == 0
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == {
        0: "ape",
        1: "zebra",
    }


def test_values_in_a_file_make_a_regression(tmp_path):
    rows = [{"text": row["sentence1"], "label": row["label"]} for row in make_rows("stsb", 16, seed=5)]
    train = write_rows(tmp_path / "train.csv", rows)
    told = dict(task_name=None, train_file=train, validation_file=train)
    assert command_line(flags(tmp_path / "out", **told)) == 0
    assert {"eval_pearson", "eval_spearmanr"} <= results(tmp_path / "out").keys()


def test_a_task_from_the_hub(tmp_path, monkeypatch):
    """datasets is asked for the data set and its task; a stub answers."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, task):
        asked.append((name, task))
        names = ("train", *TASKS[task].evaluations, "test")
        return {name: datasets.Dataset.from_list(make_rows(task, 16, seed=3)) for name in names}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    model = make_classifier(tmp_path / "model", "bert")
    assert command_line(flags(tmp_path / "out", task_name="mnli", model_name_or_path=model)) == 0
    assert asked == [("nyu-mll/glue", "mnli")]
    assert list(record(tmp_path / "out", "scores")[0]["splits"]) == ["validation_matched", "validation_mismatched"]


def test_an_update_is_the_mean_over_its_examples(tmp_path):
    """However they are cut into micro-batches, also in the last update of an epoch."""
    make_classifier(tmp_path / "still", "bert", dropout=0.0)
    told = dict(model_name_or_path=tmp_path / "still", num_train_epochs=2, method="full")
    cuts = {"whole": (16, 1), "cut": (4, 4), "small": (2, 8)}
    for name, (size, steps) in cuts.items():
        more = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        assert command_line(flags(tmp_path / name, **told, **more)) == 0
    for name in ("cut", "small"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_a_llama_by_its_config_and_weights(tmp_path, place):
    """--eval_llama: shape from one folder, weights by name from another, padding on the left."""
    body = AutoModelForSequenceClassification.from_pretrained(make_classifier(tmp_path / "body", "llama", head=True))
    torch.save({name: value + 1 for name, value in body.state_dict().items()}, tmp_path / "pytorch_model.bin")
    told = dict(model_name_or_path="llama", tokenizer_name="llama", eval_llama=True, load_pretrained_model=tmp_path,
        learning_rate=1e-9, max_train_steps=1)  # fmt: skip
    assert command_line(flags(tmp_path / "out", **told)) == 0
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.allclose(saved.model.norm.weight, body.model.norm.weight + 1)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"


def test_the_models_own_order_of_the_labels_is_kept(tmp_path, place):
    model = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=2)
    model.config.label2id = {"NOT_ENTAILMENT": 0, "ENTAILMENT": 1}
    model.config.id2label = {0: "NOT_ENTAILMENT", 1: "ENTAILMENT"}
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / "model")
    assert command_line(flags(tmp_path / "out", model_name_or_path=tmp_path / "model", max_train_steps=1)) == 0
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert saved.label2id == {"entailment": 1, "not_entailment": 0}


def test_scores_are_by_the_tasks_order_whatever_the_models_is(tmp_path, place):
    """F1 was that of the other class, of `not_equivalent`, for a model that has it as number 1."""
    scores = {}
    for name, order in (("glue", ("NOT_EQUIVALENT", "EQUIVALENT")), ("other", ("EQUIVALENT", "NOT_EQUIVALENT"))):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_pretrained(place / "bert", num_labels=2)
        if name == "other":  # the same answers, by their names
            for p in (model.classifier.weight, model.classifier.bias):
                p.data = p.data.flip(0)
        model.config.label2id = {label: number for number, label in enumerate(order)}
        model.config.id2label = dict(enumerate(order))
        model.save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(place / "bert").save_pretrained(tmp_path / name)
        more = dict(task_name="mrpc", model_name_or_path=tmp_path / name, learning_rate=1e-12, max_train_steps=1)
        assert command_line(flags(tmp_path / f"out {name}", **more)) == 0
        scores[name] = results(tmp_path / f"out {name}")
    assert scores["other"]["eval_f1"] == scores["glue"]["eval_f1"]
    assert scores["other"]["eval_accuracy"] == scores["glue"]["eval_accuracy"]


@pytest.mark.parametrize(
    "labels, names, number",
    [
        ([True, False, True], ("False", "True"), 1),
        ([3, 1, 3], ("1", "3"), 1),
        (["+1", "-1", "+1"], ("-1", "1"), 1),
        (["+-5", "x", "+-5"], ("+-5", "x"), 0),
        ([0.5, 2, 0.5], (), 0.5),
    ],
    ids=str,
)
def test_what_labels_of_ones_own_files_are(labels, names, number, tmp_path):
    """Classes by their names, of which JSON's true and false are two, or values."""
    for split in ("train", "validation"):
        rows = [{"sentence": f"text {place}", "label": label} for place, label in enumerate(labels)]
        (tmp_path / f"{split}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {f"{split}_file": str(tmp_path / f"{split}.json") for split in ("train", "validation")}
    found = load_examples(argparse.Namespace(task_name=None, validation_mismatched_file=None, **given))
    assert found.task.labels == names and found.train[0].label == number


@pytest.mark.parametrize("label", [None, float("inf"), float("nan")])
def test_a_label_that_is_none_is_named_with_its_row(label, tmp_path):
    for split in ("train", "validation"):
        rows = [{"sentence": "a", "label": 0.5}, {"sentence": "b", "label": 1.5 if split == "train" else label}]
        (tmp_path / f"{split}.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = {f"{split}_file": str(tmp_path / f"{split}.json") for split in ("train", "validation")}
    args = argparse.Namespace(task_name=None, validation_mismatched_file=None, **given)
    assert "row 2 of the validation data has the label" in message_of(lambda: load_examples(args))


BAD = [
    ({"task_name": None}, "give --task_name"),
    ({"task_name": None, "train_file": "glue/rte/train.csv"}, "--validation_file is missing"),
    ({"train_file": "no.csv", "validation_file": "no.csv"}, "no.csv cannot be read"),
    ({"train_file": "bert/config.yaml", "validation_file": "x.csv"}, "must be .csv, .tsv, .json, .jsonl"),
    ({"train_file": "glue/sst2/train.csv", "validation_file": "glue/sst2/train.csv"}, "has no column `sentence1`"),
    ({"train_file": "glue/stsb/train.csv", "validation_file": "glue/rte/train.csv"}, "has the label"),
    ({"model_name_or_path": "./no/such"}, "the tokenizer of ./no/such cannot be used"),
    ({"model_name_or_path": "headed", "task_name": "mnli"}, "--ignore_mismatched_sizes draws a new one"),
    ({"max_length": 513}, "allows at most 512"),
    ({"method": "lora", "enable_galore": True}, "leave one of them out"),
    ({"push_to_hub": True}, "uploads nothing"),
    ({"trust_remote_code": "True"}, "never run"),
    ({"qlora_codec": "nf4"}, "only qlora"),
    ({"lora_r": 0}, "--lora_r 0"),
    ({"learning_rate": -1}, "--learning_rate -1"),
    ({"num_warmup_steps": 100}, "--num_warmup_steps 100"),
    ({"checkpointing_steps": "often"}, "--checkpointing_steps often"),
    ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
    ({"proj_typ": "std"}, "did you mean --proj_type"),
]  # fmt: skip


@pytest.mark.parametrize("more, words", BAD, ids=[words for _, words in BAD])
def test_what_cannot_be_meant_is_one_line(more, words, tmp_path, capsys):
    assert command_line(flags(tmp_path / "out", **more)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0], errors
