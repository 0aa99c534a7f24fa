"""Command lines, and the one line with which each that cannot be meant is refused."""

from collections.abc import Callable

import pytest

import torchrun_main
from peft_pretraining.cli.args import parse_args
from peft_pretraining.errors import UserError

REQUIRED = ["--model_config", "configs/llama_9m.json", "--batch_size", "16"]


def parse(*more: object, world_size: int = 1):
    """The arguments of REQUIRED and these, completed and checked."""
    return parse_args([*REQUIRED, *map(str, more)], world_size=world_size)


def message_of(call: Callable[[], object]) -> str:
    """The message of the UserError that a call ends with: one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def flags_refusal(*more: object, world_size: int = 1) -> str:
    """Why `parse` refuses flags."""
    return message_of(lambda: parse(*more, world_size=world_size))


def refusal(flags: list[object], capsys, *, program: Callable = torchrun_main.command_line, status: int = 2) -> str:
    """Why a program that is started with flags ends: the last line on stderr, the only one that begins with `error:`.

    The main script may have logged before it; another program says nothing else.
    """
    assert program([str(flag) for flag in flags]) == status
    lines = capsys.readouterr().err.splitlines()
    if program is torchrun_main.command_line:
        lines = [line for line in lines if " | " not in line and not line.startswith("name ")]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0], lines
    else:
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[-1].removeprefix("error: ")
