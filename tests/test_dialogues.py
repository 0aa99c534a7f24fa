"""Dialogues from files to batches: forms of records, what is refused, lengths, packing, order and position."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from support.batches import take
from support.command_line import message_of
from support.dialogues import VOCABULARY, load_chat, make_chat_folder, sums, turns, write_dialogues
from transformers import LlamaConfig

from peft_pretraining.batch import IGNORED, Batch
from peft_pretraining.data.chat import ChatTemplate
from peft_pretraining.data.dialogues import messages_of
from peft_pretraining.data.epochs import measure_epoch
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.order import Dialogue, Document, Skipped
from peft_pretraining.data.packing import MAX_LEFT_OUT, TooLong, Truncate, Whole, make_packer
from peft_pretraining.data.pieces import Piece
from peft_pretraining.data.position import Position, Progress
from peft_pretraining.data.sources import open_documents
from peft_pretraining.data.validation import ValidationSet
from peft_pretraining.model.build import build_model
from peft_pretraining.model.loss import block_mask, token_loss_sum

PAD = 256  # <|endoftext|>
LENGTH = 192


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_chat(make_chat_folder(tmp_path_factory.mktemp("tokenizer") / "chat"))


@pytest.fixture
def opened(tmp_path, chat):
    """A source of dialogues, from records or a file."""

    def open_(records, *, split="train", **options):
        path = records if not isinstance(records, list) else write_dialogues(tmp_path / "d" / "train.jsonl", records)
        options = {"validation": str(path), "seed": 0} | options
        return open_documents(str(path), split=split, template=ChatTemplate(chat), **options)

    return open_


def dialogue(asked: int, answered: int, *further: int, place: int = 0) -> Piece:
    """Ids 1, 2, ...: so many of a question, so many of an answer, and so on."""
    learned = np.concatenate([np.full(count, i % 2 == 1) for i, count in enumerate((asked, answered, *further))])
    return Piece(np.arange(1, len(learned) + 1), Position(document=place), False, learned=learned)


# Records


@pytest.mark.parametrize(
    ("fields", "messages"),
    [
        ({"messages": turns("user", "a", "assistant", "b")}, turns("user", "a", "assistant", "b")),
        ({"prompt": "a", "completion": "b", "system": "s"}, turns("system", "s", "user", "a", "assistant", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, turns("user", "a", "assistant", "b")),
        ({"instruction": "a", "input": "x", "output": "b"}, turns("user", "a\n\nx", "assistant", "b")),
        ({"messages": None, "prompt": "a", "completion": "b"}, turns("user", "a", "assistant", "b")),
    ],
)
def test_forms_of_a_record(fields, messages):
    assert messages_of(fields) == messages


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "no dialogue (fields: text): give messages, or prompt and completion"),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": "hi"}, '"messages" is not a list but "hi"'),
        ({"messages": [{"content": "a"}]}, "message 1 has no role"),
        ({"messages": turns("user", "a", "robot", "b")}, 'message 2 has the unknown role "robot" (known: system'),
        ({"messages": turns("user", "a")}, "no assistant turn"),
        ({"messages": turns("user", "a", "assistant", " ")}, "message 2, an answer, is empty"),
        ({"messages": [{"role": "user", "content": [1]}]}, "the content of message 1 is not a string but [1]"),
        ({"prompt": "a"}, '"completion" is not a string but null'),
        ({"instruction": "a", "output": ""}, '"output" is empty'),
        ({"messages": turns("user", "a", "assistant", "b"), "tools": "{"}, '"tools" is not valid JSON'),
    ],
)
def test_a_bad_record_is_skipped_with_its_line(opened, record, reason):
    source = opened([*sums(2), record])
    source.check()
    (skipped,) = [item.reason for item in source.read(epoch=0) if isinstance(item, Skipped)]
    assert "train.jsonl line 3: " in skipped and reason in skipped and "\n" not in skipped


def test_a_file_of_bad_records_is_one_clear_line(opened, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"messages": [\n{"text": "a"}\n')
    assert "can be read. The first problem: " in message_of(opened(path).check)
    assert "line 1: not valid JSON" in message_of(opened(path).check)


@pytest.mark.parametrize("dataset", ["c4", "pydocs"])
def test_texts_are_no_dialogues(chat, dataset):
    message = message_of(lambda: open_documents(dataset, split="train", seed=0, template=ChatTemplate(chat)))
    assert f"{dataset} holds texts, and --task sft needs dialogues" in message


def test_all_formats_hold_the_same_dialogues(opened, tmp_path):
    """JSON lines, a JSON array over many lines, and a table, whose turns have all fields of all turns."""
    import pyarrow
    import pyarrow.parquet

    records = sums(5)
    records[0]["messages"].insert(1, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]})
    (tmp_path / "train.json").write_text(json.dumps(records, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "train.parquet")
    expected, *others = (
        [item.text for item in opened(source, seed=1).read(epoch=0) if isinstance(item, Document)]
        for source in (records, tmp_path / "train.json", tmp_path / "train.parquet")
    )
    assert len(expected) == 5 and all(other == expected for other in others)
    assert all(isinstance(text, Dialogue) for text in expected)


def test_a_damaged_array_is_one_clear_line(opened, tmp_path):
    path = tmp_path / "train.json"
    path.write_text('[{"prompt": "a", "completion": "b"},\n{"prompt": ')
    assert "not a valid JSON array (Expecting value: line 2 column 12" in message_of(opened(path).check)


# Lengths


def test_a_dialogue_that_is_too_long_ends_after_the_last_answer_that_fits():
    """With every place taken there is one target more than places: the last id is a target only."""
    whole = Whole(length=9, pad_id=0)
    assert list(whole.add(dialogue(3, 2, 3, 2))) == []  # 10 ids take 9 places
    (full,) = whole.add(dialogue(3, 2, 3, 3, place=1))
    assert full.tokens[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9] and full.too_long == TooLong()
    assert whole.too_long == TooLong(shortened=1)
    (rest,) = whole.end()
    assert rest[1].tolist() == [IGNORED, IGNORED, 4, 5] + [IGNORED] * 5


def test_answers_are_whole_or_their_dialogue_is_left_out():
    packers = Whole(length=6, pad_id=0), Truncate(length=6, eos_id=0, pad_id=0)
    for packer in packers:
        assert list(packer.add(dialogue(6, 2))) == list(packer.end()) == []
    assert packers[0].too_long == packers[1].fitting.take() == TooLong(left_out=1)
    (kept,) = packers[1].add(dialogue(5, 2, 1, 4, place=3))
    assert kept.tokens.tolist() == [[1, 2, 3, 4, 5, 6], [IGNORED] * 4 + [6, 7]]
    assert kept.position == Position(document=4) and kept.too_long == TooLong(shortened=1)


def test_dialogues_that_never_fit_end_the_run():
    whole = Whole(length=6, pad_id=0)
    message = message_of(lambda: [list(whole.add(dialogue(6, 2))) for _ in range(MAX_LEFT_OUT)])
    assert f"{MAX_LEFT_OUT} dialogues in a row are too long" in message and "--max_length 6" in message


# Packing


def test_a_packed_sequence_to_the_token():
    whole = Whole(length=10, pad_id=0)
    assert list(whole.add(dialogue(2, 2))) == list(whole.add(dialogue(1, 2, place=1))) == []
    (sequence,) = whole.add(dialogue(4, 4, place=7))
    none = IGNORED
    assert sequence.tokens.tolist() == [
        [1, 2, 3, 1, 2, 0, 0, 0, 0, 0],
        [none, 3, 4, 2, 3, none, none, none, none, none],
        [0, 1, 2, 0, 1, 0, 1, 2, 3, 4],
    ]
    assert sequence.position == Position(document=7), "the next dialogue is read again"
    (sequence,) = whole.add(dialogue(4, 4)._replace(position=Position(epoch=1)))
    assert (sequence.epoch, sequence.position.epoch) == (0, 1), "whose epoch does not count yet"


def test_a_mask_of_blocks():
    mask = block_mask(torch.tensor([[0, 1, 0, 1, 2]]))
    seen = [[0], [0, 1], [2], [2, 3], [2, 3, 4]]
    assert [row.nonzero().flatten().tolist() for row in mask[0, 0]] == seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_dialogues_have_the_loss_and_gradient_of_single_ones(opened, chat, checkpointing):
    """In float64, whatever stands beside them; without the mask they do not."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    source = opened(sums(12), split="validation")
    sets = {
        packing: ValidationSet(source, chat, tokens=10_000, batch_size=64, max_length=512, packing=packing)
        for packing in ("whole", "truncate")
    }
    found = {}
    for packing, validation in sets.items():
        model = build_model(config, device="cpu", dtype=torch.float64, seed=0, activation_checkpointing=checkpointing)
        (batch,) = validation
        loss = token_loss_sum(model, batch.input_ids, batch.targets, batch.positions)
        loss.backward()
        found[packing] = loss.detach(), [p.grad for p in model.parameters()]
        if packing == "whole":
            crossed = token_loss_sum(model, batch.input_ids, batch.targets)
    assert len(sets["whole"].sequences) * 3 < len(sets["truncate"].sequences) == 12
    assert sets["whole"].tokens == sets["truncate"].tokens
    assert (found["whole"][0] - found["truncate"][0]).abs() < 1e-9 < (crossed - found["whole"][0]).abs()
    for packed, single in zip(found["whole"][1], found["truncate"][1], strict=True):
        assert (packed - single).abs().max() < 1e-10


# Order and position


def told(batches: list[Batch]) -> list[list[int]]:
    return torch.cat([torch.cat((batch.input_ids, batch.targets), dim=1) for batch in batches]).tolist()


@pytest.mark.parametrize("packing", ["whole", "truncate"])
def test_a_run_goes_on_in_mid_epoch_where_it_was(opened, chat, packing):
    """With bad and long dialogues on the way, each of which is counted once."""
    records = sums(150)
    records[20], records[40] = {"text": "bad"}, {"messages": turns("user", "x" * 300, "assistant", "long")}
    for i in range(60, 100, 4):
        records[i]["messages"] += turns("user", "x" * 200, "assistant", "too long")
    open_ = partial(train_batches, opened(records), chat, batch_size=2, max_length=LENGTH, packing=packing)
    straight = take(open_(), 80)
    for done in (11, 17, 30):
        position = json.loads(json.dumps(straight[done - 1].position.to_json()))
        resumed = take(open_(resume=position), 80 - done)
        assert told(resumed) == told(straight[done:])
        assert [b.skipped for b in resumed] == [b.skipped for b in straight[done:]]
        assert [b.too_long for b in resumed] == [b.too_long for b in straight[done:]]
    assert any(b.skipped for b in straight) and all(map(any, zip(*(b.too_long for b in straight), strict=True)))


@pytest.mark.parametrize("packing", ["whole", "truncate"])
def test_ranks_and_workers_share_the_sequences(opened, chat, packing):
    open_ = partial(train_batches, opened(sums(90)), chat, max_length=LENGTH, packing=packing)
    alone = take(open_(batch_size=2), 12)
    ranks = [take(open_(batch_size=1, rank=rank, world_size=2, workers=1), 12) for rank in range(2)]
    for one, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(one.input_ids, torch.cat([part.input_ids for part in parts]))
        assert torch.equal(one.targets, torch.cat([part.targets for part in parts]))
        assert one.position == Progress.merged([part.position for part in parts])


def test_an_epoch_has_every_dialogue_once(opened, chat):
    records = sums(64)
    batches = train_batches(opened(records), chat, batch_size=1, max_length=LENGTH, packing="truncate")
    answers = [chat.decode(batch.targets[batch.targets != IGNORED].tolist()) for batch in take(batches, 64)]
    assert len(set(answers)) == 64 and all(answer.startswith("It is ") for answer in answers)


@pytest.mark.parametrize("packing", ["whole", "truncate"])
def test_the_length_of_an_epoch_is_that_of_a_run(opened, chat, packing):
    """Within one sequence for each of the 16 readers."""
    source = opened(sums(200))
    epoch = measure_epoch(source, chat, packing=packing, max_length=LENGTH)
    assert epoch.dialogues == 200
    batches = train_batches(source, chat, batch_size=1, max_length=LENGTH, packing=packing)
    ended = next(i for i, batch in enumerate(batches) if min(p.epoch for p in batch.position.readers) == 1)
    batches.close()
    assert abs(ended - epoch.sequences) <= 17
    assert epoch.sequences == 200 if packing == "truncate" else 0.6 < epoch.filled <= 1


def test_dialogues_are_held_out_by_their_text(opened, tmp_path, chat):
    """Where there is no validation file, 1 in 100."""
    path = write_dialogues(tmp_path / "d" / "train.jsonl", sums(400))
    train, held_out = (
        [item.text.text for item in opened(path, split=split, validation=None).read(epoch=0)]
        for split in ("train", "validation")
    )
    assert len(train) + len(held_out) == len({*train, *held_out}) == 400 and 0 < len(held_out) < 20


def test_packers_by_name(chat):
    assert isinstance(make_packer("whole", chat, length=8), Whole)
    assert make_packer("whole", chat, length=8).nothing().shape == (3, 8)
    assert make_packer("truncate", chat, length=8).nothing().shape == (2, 8)
