"""What --help prints: an overview, one group of flags, one flag, or all of them, as wide as the terminal."""

import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence

from peft_pretraining.cli.flags import FLAGS, GROUPS, flag_type, shown_default
from peft_pretraining.errors import UserError
from qgalore.options import Declared

COMMON = (  # what most runs need
    "config", "preset", "model_config", "dataset", "tokenizer", "optimizer", "lr", "rank", "batch_size",
    "total_batch_size", "num_training_steps", "save_dir", "resume", "dry_run",
)  # fmt: skip
LONGEST = 30  # letters of the possible words of a flag; longer lists go into the text below it

USAGE = """\
usage: torchrun_main.py --model_config JSON --batch_size N [flags]
       torchrun_main.py --preset NAME [flags]
       torchrun_main.py --config YAML [flags]
"""
ABOUT = (
    "Pre-trains a LLaMA or Qwen3 model from scratch with a memory-efficient optimizer. Start it with `torchrun "
    "--standalone`, for several GPUs with `torchrun --standalone --nproc_per_node N`, or in one process with `python`."
)
MORE = (
    "--help GROUP or --help FLAG prints its flags in full, --help all every flag. - and _ are alike in a flag's name. "
    "A switch that a preset or a file has turned on is turned off by --no-NAME."
)


def show_help(argv: Sequence[str]) -> None:
    """Prints what `--help [TOPIC]` asks for, on the main rank, and exits; returns if the command line has no --help.

    TOPIC is the word behind it; a flag is one only at the end of the line. Raises UserError for an unknown topic.
    """
    asked = next((i for i, text in enumerate(argv) if text.partition("=")[0] in ("-h", "--help")), None)
    if asked is None:
        return
    topic = argv[asked].partition("=")[2] or (argv[asked + 1] if len(argv) > asked + 1 else "")
    if topic.startswith("-") and len(argv) > asked + 2:
        topic = ""
    text = help_text(topic, width=shutil.get_terminal_size().columns)
    if os.environ.get("RANK", "0") == "0":
        print(text)
    sys.exit(0)


def help_text(topic: str = "", *, width: int = 80) -> str:
    """The text about a topic: a group or a flag, with or without its dashes; "all"; or "" for the overview.

    No line is longer than `width`, unless a single word is. Raises UserError for an unknown topic.
    """
    name = topic.lstrip("-").replace("-", "_").lower()
    if not name:
        return "\n".join([USAGE, _filled(ABOUT, width), "", *_overview(width), "", _filled(MORE, width)])
    if name == "all":
        return "\n\n".join(_group(group, width) for group in GROUPS)
    if name in GROUPS and not topic.startswith("-"):
        return _group(name, width)
    if name in FLAGS:
        return _flag(FLAGS[name], width) + f"\n\nIts group: --help {_group_of(FLAGS[name])}"
    close = difflib.get_close_matches(name, ["all", *GROUPS, *FLAGS], n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"--help {topic}: there is no such group or flag. {hint}Groups: {', '.join(GROUPS)}.")


def _overview(width: int) -> Iterable[str]:
    yield "What most runs need:"
    column = 2 + max(map(len, COMMON)) + 4
    for name in COMMON:
        yield _filled(f"--{name:{column - 4}}{_first_words(FLAGS[name])}", width, indent=2, hanging=column)
    yield ""
    yield "All flags by group:"
    for group, section in GROUPS.items():
        names = " ".join(f"--{name}" for name, each in FLAGS.items() if each.option.section == section)
        yield _filled(f"{group}: {section}", width, indent=2, hanging=4)
        yield _filled(names, width, indent=6)


def _first_words(each: Declared) -> str:
    """The beginning of a flag's help, up to the first stop."""
    text = each.option.help
    return text[: min(text.find(stop) % (len(text) + 1) for stop in (". ", "; ", ": "))]


def _group(group: str, width: int) -> str:
    flags = [each for each in FLAGS.values() if each.option.section == GROUPS[group]]
    return "\n".join([_filled(f"{group}: {GROUPS[group]}", width), "", *(_flag(each, width) for each in flags)])


def _group_of(each: Declared) -> str:
    return next(group for group, section in GROUPS.items() if section == each.option.section)


def _flag(each: Declared, width: int) -> str:
    """A flag with its unit or its possible words, and its meaning and default below it."""
    notes, choices = [], each.option.flag_choices or each.option.choices
    words = "|".join(choices or ())
    if len(words) > LONGEST:
        notes.append(f"one of {', '.join(choices or ())}")
        words = "NAME"
    default = "required" if each.option.required else shown_default(each)
    if default is not None:
        notes.append(default if each.option.required else f"default: {default}")
    value = "" if flag_type(each) is bool else f" {words or each.option.unit}"
    meaning = each.option.help + (f" ({'; '.join(notes)})" if notes else "")
    return _filled(f"--{each.flag}{value}", width, indent=2) + "\n" + _filled(meaning, width, indent=8)


def _filled(text: str, width: int, *, indent: int = 0, hanging: int | None = None) -> str:
    """The text in lines of at most `width`: indent: spaces before the first line, hanging: before the others."""
    rest = " " * (indent if hanging is None else hanging)
    return textwrap.fill(
        text, max(width, 20), initial_indent=" " * indent, subsequent_indent=rest, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
