"""Multiple choice by likelihood: the prompt to the letter, likelihoods beside transformers', scores, bad files."""

import csv
import json

import pytest
import torch
from support.command_line import message_of
from support.dialogues import VOCABULARY, load_chat, make_chat_folder
from support.tokenizers import make_unigram_folder
from transformers import LlamaConfig

from peft_pretraining import multiple_choice
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.model.build import build_model
from peft_pretraining.multiple_choice import Question, build_choices, evaluate_subject, log_likelihoods, read_questions

CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=400,
)  # fmt: skip
QUESTIONS = [Question(f"What is {i} + 1?", (str(i), str(i + 1), str(i + 2), "none"), 1) for i in range(9)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_chat(make_chat_folder(tmp_path_factory.mktemp("tokenizer") / "chat"))


@pytest.fixture
def model():
    return build_model(CONFIG, device="cpu", dtype=torch.float64, seed=0).eval()


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def as_row(question: Question) -> list[str]:
    return [question.text, *question.choices, "ABCD"[question.answer]]


def make_data(folder):
    for subject in ("high_school_sums", "more"):
        write(folder / "dev" / f"{subject}_dev.csv", map(as_row, QUESTIONS[:3]))
        write(folder / "test" / f"{subject}_test.csv", map(as_row, QUESTIONS[3:]))
    return folder


def test_the_prompt_to_the_letter(chat):
    options = dict(subject="high_school_sums", shots=QUESTIONS[:1], tokenizer=chat, max_length=400)
    choices, used = build_choices(QUESTIONS[3], **options)
    assert used == 1 and [chat.decode(ids[choices.shared :]) for ids in choices.ids] == list("ABCD")
    assert chat.decode(choices.ids[2]) == (
        "The following are multiple choice questions (with answers) about high school sums.\n\n"
        "What is 0 + 1?\nA. 0\nB. 1\nC. 2\nD. none\nAnswer: B\n\n"
        "What is 3 + 1?\nA. 3\nB. 4\nC. 5\nD. none\nAnswer: C"
    )


def test_shots_that_have_no_room_are_left_out(chat):
    options = dict(subject="s", tokenizer=chat, max_length=230)
    choices, used = build_choices(QUESTIONS[3], shots=QUESTIONS[:3], **options)
    assert used == 2 and max(map(len, choices.ids)) <= 231
    long = Question("x" * 300, ("a", "b", "c", "d"), 0)
    assert "a question of s has more than 230 tokens: 'xxx" in message_of(
        lambda: build_choices(long, shots=[], **options)
    )


@pytest.mark.parametrize("letters", ["one", "many"])
def test_likelihoods_are_those_of_whole_sequences(chat, model, letters, tmp_path):
    """Each choice by itself, unpadded, through transformers' own head, in float64; also where choices are long."""
    built = [
        build_choices(q, subject="s", shots=QUESTIONS[:n], tokenizer=chat, max_length=400)[0]
        for n, q in enumerate(QUESTIONS[3:6])
    ]
    if letters == "many":
        built = [
            each._replace(ids=[ids[: each.shared] + [65 + i] * (i + 1) for i, ids in enumerate(each.ids)])
            for each in built
        ]
    found = log_likelihoods(model, built, pad_id=chat.pad_id)
    for row, each in zip(found, built, strict=True):
        for value, ids in zip(row, each.ids, strict=True):
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = sum(logs[t - 1, ids[t]] for t in range(each.shared, len(ids)))
            assert abs(value - expected) < 1e-10


def test_a_batch_changes_nothing_and_the_best_is_counted(chat, model):
    options = dict(subject="s", shots=QUESTIONS[:2], max_length=400)
    one = evaluate_subject(model, chat, QUESTIONS[3:], batch_size=1, **options)
    assert one == evaluate_subject(model, chat, QUESTIONS[3:], batch_size=4, **options)
    best = [
        int(log_likelihoods(model, [build_choices(q, tokenizer=chat, **options)[0]], pad_id=0).argmax())
        for q in QUESTIONS[3:]
    ]
    assert one.correct == sum(index == 1 for index in best) and one.questions == 6
    rigged = [question._replace(answer=index) for question, index in zip(QUESTIONS[3:], best, strict=True)]
    assert evaluate_subject(model, chat, rigged, batch_size=4, **options).accuracy == 1


def test_the_command_from_folder_to_json(chat, tmp_path, capsys):
    folder = make_chat_folder(tmp_path / "model")
    build_model(CONFIG, device="cpu", dtype=torch.float32, seed=0).save_pretrained(folder)
    flags = ["--model", folder, "--data", make_data(tmp_path / "mmlu"), "--shots", 2, "--output", tmp_path / "r.json"]
    assert multiple_choice.command_line([*map(str, flags), "--dtype", "float32", "--limit", "4"]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["questions"] == 8 and set(result["subjects"]) == {"high_school_sums", "more"}
    assert result["accuracy"] == sum(s["correct"] for s in result["subjects"].values()) / 8
    assert f"accuracy {result['accuracy']:.4f} over 8 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([["q", "a", "b", "c", "d", "A"], ["q", "a", "b", "c", "A"]], "line 2: 5 columns, where question"),
        ([["q", "a", "b", "c", "d", "E"]], "line 1: the answer is 'E', not one of A, B, C, D"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, rows, reason):
    assert reason in message_of(lambda: read_questions(write(tmp_path / "a_test.csv", rows)))


def test_a_heading_and_quotes_are_understood(tmp_path):
    rows = [["question", "A", "B", "C", "D", "answer"], ['say "hi",\nplease ', "a", "b", "c", "d", " C"]]
    (question,) = read_questions(write(tmp_path / "a_test.csv", rows))
    assert question == Question('say "hi",\nplease', ("a", "b", "c", "d"), 2)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--data", "{data}/test"], "holds no SUBJECT_test.csv: give the folder that has dev, val and test"),
        (["--data", "{data}", "--subjects", "none"], "has no none_test.csv"),
        (["--data", "{data}", "--shots", "-1"], "--shots -1: must be at least 0"),
        (["--data", "{data}", "--split", "val"], "val holds no SUBJECT_val.csv"),
    ],
)
def test_what_cannot_be_asked_is_said_before_the_model_is_read(tmp_path, capsys, flags, reason):
    data = make_data(tmp_path / "mmlu")
    assert multiple_choice.command_line(["--model", "nowhere", *(flag.format(data=data) for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_tokenizer_of_words_tells_the_letters_apart(tmp_path):
    """Its letters stand alone behind a word boundary."""
    tokenizer = load_tokenizer(str(make_unigram_folder(tmp_path / "words")))
    lower = Question("the cat", ("a", "b", "c", "d"), 0)
    choices, _ = build_choices(lower, subject="s", shots=[], tokenizer=tokenizer, max_length=400)
    assert len(choices.ids) == 4 and choices.shared > 0
