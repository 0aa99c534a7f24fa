"""--help: an overview that fits a terminal, groups and flags in full, and nothing that the table of flags has not."""

import pytest
from support.command_line import message_of, parse

from peft_pretraining.cli.args import parse_args
from peft_pretraining.cli.flags import FLAGS, GROUPS
from peft_pretraining.cli.help import COMMON, USAGE, help_text

TOPICS = ["", "all", *GROUPS, *(f"--{name}" for name in FLAGS)]


def words(text: str) -> str:
    """The text as one line."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [40, 80, 132])
def test_no_line_is_wider_than_the_terminal(width):
    for topic in TOPICS:
        for line in help_text(topic, width=width).splitlines():
            assert len(line) <= width or len(line.split()) == 1 or (width == 40 and line in USAGE), line
    assert max(len(line) for line in help_text("all", width=width).splitlines()) > width - 12, "it uses the width"


def test_the_overview_is_short_and_names_every_flag_under_its_group():
    text = help_text()
    lines = text.splitlines()
    assert lines[0].startswith("usage: ") and len(lines) < 75 and "[--" not in text
    common, _, groups = text.partition("All flags by group:")
    assert all(f"\n  --{name} " in common for name in COMMON)
    parts = words(groups)
    for name, each in FLAGS.items():
        group = next(key for key, section in GROUPS.items() if section == each.option.section)
        here = parts.partition(f"{group}: {GROUPS[group]}")[2]
        assert f"--{name} " in here.partition(": ")[0] + " ", name


def test_a_group_shows_its_flags_in_full_and_no_others():
    for group, section in GROUPS.items():
        text = help_text(group)
        found = [line.split()[0][2:] for line in text.splitlines() if line.startswith("  --")]
        assert found == [name for name, each in FLAGS.items() if each.option.section == section]
        assert words(text) in words(help_text("all"))
    assert set(GROUPS.values()) == {each.option.section for each in FLAGS.values()}


def test_a_flag_has_unit_words_meaning_and_default():
    assert words(help_text("rank")).startswith("--rank COLUMNS columns of each basis")
    assert help_text("rank") == help_text("--rank") and "(default: 128)" in words(help_text("rank"))
    assert "--wandb_mode online|offline|disabled" in help_text("wandb-mode")
    assert "one of std, reverse_std, left," in words(help_text("proj_type"))
    assert "(required)" in words(help_text("model_config"))
    assert help_text("--optimizer") != help_text("optimizer"), "a flag, and a group"
    for name, each in FLAGS.items():
        assert words(each.option.help) in words(help_text(f"--{name}"))


@pytest.mark.parametrize("topic, says", [
    ("galor", "--help galor: there is no such group or flag. Did you mean galore"),
    ("--rnak", "--help --rnak: there is no such group or flag. Did you mean rank?"),
    ("xyzzy", "Groups: model, data, training, optimizer, galore, adapters, quantization, checkpoints, run."),
])  # fmt: skip
def test_an_unknown_topic_gets_one_line_with_the_nearest_names(topic, says):
    assert says in message_of(lambda: parse("--help", topic))


@pytest.mark.parametrize("line, topic", [
    (["--help"], ""), (["-h"], ""), (["--help", "galore"], "galore"), (["--help=galore"], "galore"),
    (["--rank", "4", "--help", "--lr"], "--lr"), (["--help", "--lr", "3"], ""), (["--help", "GaLore"], "galore"),
], ids=str)  # fmt: skip
def test_the_topic_is_the_word_behind_help(capsys, monkeypatch, line, topic):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse_args(line)
    assert stop.value.code == 0
    assert capsys.readouterr().out == help_text(topic, width=100) + "\n"


def test_a_second_rank_says_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert capsys.readouterr().out == ""
