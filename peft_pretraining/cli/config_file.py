"""A file for --config: any flags by their names, in YAML; and the configuration of a run as such a file.

optimizer: galore_adamw     each value as on the command line
stochastic_round: true      a switch
tags: [trial, 60m]          the same as trial,60m
tokenizer: null             the flag's default, whatever a preset says
galore:                     flags may stand below the name of their group, see --help
  rank: 128
"""

import argparse
import difflib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml
from loguru import logger

from peft_pretraining.cli.flags import FLAGS, GROUPS, flag_type
from peft_pretraining.errors import Parser, UserError
from qgalore.options import Declared

NAME = "config.yaml"  # in the folder of a run
LISTS = ("tags", "allow_changed")  # flags with several words, separated by commas
# What a saved configuration leaves out: what belongs to one start of a run, not to the run, and what follows from
# total_batch_size and num_training_steps.
LEFT_OUT = (
    "config", "preset", "save_dir", "resume", "allow_changed", "dry_run", "eval_only", "unset_wandb",
    "time_budget", "fit", "gradient_accumulation", "max_train_tokens",
)  # fmt: skip
HEADER = "# The configuration of this run; `torchrun_main.py --config FILE` does it again.\n"


def read_config_file(path: Path, *, parser: Parser) -> dict[str, Any]:
    """The flags in a file, by name, as `parser` would make them of a command line; null is a flag's default.

    Raises UserError that names the file, the line and the flag.
    """
    found: dict[str, Any] = {}
    for key, value, group in _entries(path):
        place = f"{path} line {key.start_mark.line + 1}"
        name = _known_flag(key, group=group, place=place)
        if name in found:
            raise UserError(f"{place}: {name} is there twice.")
        found[name] = _value(FLAGS[name], value, parser=parser, place=place)
    return found


def _entries(path: Path) -> Iterator[tuple[yaml.Node, yaml.Node, str | None]]:
    """Each key with its value and the group that it stands in."""
    root = _parse(path)
    if root is None:  # nothing but comments
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: lines of the form `name: value` are needed.")
    for key, value in root.value:
        group = key.value if isinstance(key, yaml.ScalarNode) and key.value in GROUPS else None
        if group and isinstance(value, yaml.MappingNode):
            yield from ((inner, inner_value, group) for inner, inner_value in value.value)
        elif group and value.tag == "tag:yaml.org,2002:null":
            continue  # all its lines are comments
        else:
            yield key, value, None


def _parse(path: Path) -> yaml.Node | None:
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8-sig"))
        return loader.get_single_node()
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file in UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({error.problem or error.context}).") from None
    except (yaml.YAMLError, RecursionError) as error:  # letters that YAML does not know; endless nesting
        raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]}).") from None


def _known_flag(key: yaml.Node, *, group: str | None, place: str) -> str:
    """The name of the flag that a key means. Raises UserError if there is none, or not in this group."""
    text = key.value if isinstance(key, yaml.ScalarNode) else "a list"
    name = text.replace("-", "_")
    if name not in FLAGS:
        close = difflib.get_close_matches(name, [*FLAGS, *GROUPS], n=1)
        raise UserError(f"{place}: there is no flag {text!r}." + (f" Did you mean {close[0]}?" if close else ""))
    if group is not None and FLAGS[name].option.section != GROUPS[group]:
        raise UserError(f"{place}: the flag {name} does not belong to the group {group}. See --help {name}.")
    if name == "config":
        raise UserError(f"{place}: a file cannot name another one.")
    return name


def _value(each: Declared, node: yaml.Node, *, parser: Parser, place: str) -> Any:
    """The value of a flag. What the command line would refuse is refused in the same words."""
    if node.tag == "tag:yaml.org,2002:null":
        return each.default
    items = node.value if isinstance(node, yaml.SequenceNode) and each.flag in LISTS else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError(f"{place}: {each.flag} needs one value.")
    text = ",".join(item.value for item in items)
    if flag_type(each) is bool:
        if node.tag != "tag:yaml.org,2002:bool":
            raise UserError(f"{place}: {each.flag} is a switch: true or false, not {text!r}.")
        return yaml.SafeLoader.bool_values[text.lower()]
    try:
        value = vars(parser.parse_args([f"--{each.flag}={text}"]))[each.flag]
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if problem := each.option.problem(value):
        raise UserError(f"{place}: --{each.flag} {text}: {problem}.")
    return value


def config_text(args: argparse.Namespace, *, leave_out: Collection[str]) -> str:
    """The completed arguments as a file for --config, group by group, without LEFT_OUT and `leave_out`.

    A run with it has the same updates; on another number of processes, too, if --batch_size fits.
    """
    left_out = {*LEFT_OUT, *leave_out}
    kept = {name: value for name in FLAGS if (value := getattr(args, name)) is not None and name not in left_out}
    tree = {
        group: {name: value for name, value in kept.items() if FLAGS[name].option.section == section}
        for group, section in GROUPS.items()
    }
    filled = {group: flags for group, flags in tree.items() if flags}
    return HEADER + yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=float("inf"))


def save_config(args: argparse.Namespace, save_dir: Path, *, leave_out: Collection[str]) -> None:
    """Writes SAVE_DIR/config.yaml, which is complete or absent. A run that goes on replaces it. Never stops a run."""
    partial = save_dir / f".{NAME}.incomplete"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(config_text(args, leave_out=leave_out))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(save_dir / NAME)
    except OSError as error:
        logger.error(f"{save_dir / NAME} could not be written ({error.strerror}): training goes on")
