"""benchmarks/finetune.py and what it needs: sweeps that end, tasks whose labels are true, a model to fine-tune."""

import gzip
import json
from pathlib import Path

import pytest
from support.classifiers import make_classifier, write_task
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks import finetune, text_tasks
from peft_pretraining.glue.files import read_rows
from scripts import train_mlm


def sweep(score, *, begin: float = 1e-3) -> dict[float, float]:
    """The scores of a whole sweep by rate."""
    found: dict[float, float] = {}
    while (rate := finetune.next_rate(found, begin=begin)) is not None:
        assert rate not in found
        found[rate] = score(rate)
    return found


@pytest.mark.parametrize("best", [1e-4, 1e-3, 2e-2])
def test_a_sweep_ends_with_the_best_rate_inside(best):
    found = sweep(lambda rate: -abs(rate / best - best / rate))
    rates, chosen = sorted(found), finetune.best_rate(found, begin=1e-3)
    assert rates[0] < chosen < rates[-1] and len(found) <= 6
    assert best / 1.8 < chosen < best * 1.8


def test_a_sweep_of_equal_scores_stays_where_it_began():
    found = sweep(lambda rate: 0.5)
    assert len(found) == 3 and finetune.best_rate(found, begin=1e-3) == 1e-3


def test_a_sweep_that_only_climbs_ends():
    found = sweep(lambda rate: rate)
    assert len(found) <= 6 and max(found) == pytest.approx(1e-3 * 3**4, rel=0.02)


@pytest.mark.slow  # a process for each trial
def test_the_comparison_runs_and_goes_on(tmp_path, capsys):
    model = make_classifier(tmp_path / "model", "bert")
    write_task(tmp_path / "easy", "sst2", train=32, validation=16)
    flags = ["--model", model, "--tasks", tmp_path / "easy", "--out", tmp_path / "out.jsonl", "--methods", "full",
        "q_galore", "--seeds", "0", "1", "--max_length", "32", "--epochs", "1", "--warmup", "0"]  # fmt: skip
    assert finetune.main([*map(str, flags), "--seconds", "0"]) == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert finetune.main(list(map(str, flags))) == 0
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    table = capsys.readouterr().out
    assert {(r["method"], r["seed"]) for r in records} == {(m, s) for m in ("full", "q_galore") for s in (0, 1)}
    assert all(record["memory_bytes"] > 1e8 for record in records)
    kept = {method: [r for r in records if r["method"] == method][0]["kept_bytes"] for method in ("full", "q_galore")}
    assert sum(kept["q_galore"].values()) < 0.6 * sum(kept["full"].values())
    assert "| full |" in table and "| q_galore |" in table and "±" in table
    assert finetune.main(list(map(str, flags))) == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(records), "nothing runs twice"


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Documents of ten books, whose sentences tell their book, document and place."""
    folder = tmp_path_factory.mktemp("books")
    for split, names in (("train", range(10)), ("validation", range(10, 13))):
        with gzip.open(folder / f"c4-{split}.00000-of-00001.json.gz", "wt") as file:
            for book in names:
                for number in range(12):
                    words = " ".join(f"w{index}" for index in range(45))
                    sentences = [f"B{book} D{number} S{place} {words} end." for place in range(8)]
                    sentences[1] = f'"{sentences[1][:-1]}" .'
                    file.write(json.dumps({"text": " ".join(sentences), "url": f"https://x/b{book}/{number}"}) + "\n")
    return folder


def test_labels_of_the_tasks_are_true(books, tmp_path):
    assert text_tasks.main(f"--dataset {books} --out {tmp_path} --train 80 --validation 40".split()) == 0
    for task in text_tasks.TASKS:
        for split in ("train", "validation"):
            rows = read_rows(tmp_path / task / f"{split}.csv")
            assert len(rows) == (80 if split == "train" else 40)
            counts = {label: sum(row["label"] == label for row in rows) for label in {row["label"] for row in rows}}
            assert len(counts) == text_tasks.TASKS[task][1] and len(set(counts.values())) == 1, "equally frequent"
            for row in rows:
                texts = [row[name].replace('"', "").split() for name in row if name != "label"]
                assert row["label"] == truth(task, texts), row
                assert task != "speech" or len(row["sentence"].split()) == 10 and '"' not in row["sentence"]


def truth(task: str, texts: list[list[str]]) -> str:
    """The label, from what the passages say of themselves."""
    if task == "which_book":
        return texts[0][0].removeprefix("B")  # of ten books with as many documents, the first eight by name
    if task == "speech":
        return str(int(texts[0][2] == "S1"))
    if task == "word_order":
        return str(int(texts[0][3:48] == [f"w{index}" for index in range(45)]))
    (one, document, place), (other, same, then) = (text[:3] for text in texts)
    if task == "same_book":
        return str(int(one == other))
    assert (one, document) == (other, same)
    distance = int(then[1:]) - int(place[1:])
    assert distance in (1, -1) if task == "order" else distance == 1 or distance > 2
    return str(int(distance == 1))


def test_whole_documents_are_held_out(books, tmp_path):
    text_tasks.main(f"--dataset {books} --out {tmp_path} --train 80 --validation 40".split())
    for task in text_tasks.TASKS:
        seen = {split: documents(tmp_path / task / f"{split}.csv") for split in ("train", "validation")}
        assert not seen["train"] & seen["validation"], task


def documents(path: Path) -> set[tuple[str, ...]]:
    """Book and document of every passage in a file."""
    texts = [row[name].replace('"', "") for row in read_rows(path) for name in row if name != "label"]
    return {tuple(sorted(word for word in text.split() if word[0] in "BD")) for text in texts}


@pytest.mark.slow
def test_a_small_roberta_is_trained(books, tmp_path):
    sizes = "--minutes 10 --max_steps 2 --hidden 32 --layers 1 --vocab_size 300 --max_length 32 --batch_size 4"
    assert train_mlm.main(f"--dataset {books} --out {tmp_path} {sizes}".split()) == 0
    told = json.loads((tmp_path / "training.json").read_text())
    assert told["causal"] == told["masked"] == 2 and 0 < told["masked_loss"] < 10
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("w1 end.", "w1", return_tensors="pt")
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"][0])[0] == "<s>"
    assert ids["input_ids"][0].tolist().count(tokenizer.sep_token_id) == 3
    assert model(**ids).logits.shape == (1, 2)
