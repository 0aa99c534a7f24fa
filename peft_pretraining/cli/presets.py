"""Recipes as data: configs/presets/NAME.json, whose flags hold wherever the command line says nothing.

A file may name another preset that it `extends`; its flags are then that one's, with its own in their place.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_pretraining.cli.flags import defaults
from peft_pretraining.errors import UserError
from peft_pretraining.json_files import read_json

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "configs" / "presets"


@dataclass(frozen=True)
class Preset:
    """A recipe that --preset names.

    about: what it is.
    source: where it is published or measured.
    perplexity: the published perplexity on C4; None if nothing is published.
    flags: the value of each flag by its name, as after parsing; paths are relative to the repository. None is the
        flag's default, where a preset that is extended has another value.
    measured: what we found with it, in words.
    expected: the perplexity of our own run after so many updates, by their number, and the digest of its validation
        documents, see training/expectation.py.
    """

    about: str
    source: str
    perplexity: float | None
    flags: dict[str, Any]
    measured: str | None = None
    expected: dict[str, Any] | None = None

    def describe(self) -> str:
        """In one line."""
        given = {name: value for name, value in self.flags.items() if value is not None}
        shown = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items())
        published = "" if self.perplexity is None else f", perplexity {self.perplexity:g} (published)"
        measured = "" if self.measured is None else f" ({self.measured})"
        return f"{self.about}{published}{measured}: {shown}"


def preset_names() -> list[str]:
    """All presets there are."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_preset(name: str) -> Preset:
    """The preset of that name. Raises UserError, listing the known ones, where there is none."""
    names = preset_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown --preset '{name}'. {hint}Known: {', '.join(names)}.")
    path = FOLDER / f"{name}.json"
    content = read_json(path)
    base = content.pop("extends", None)
    if base is not None:
        content["flags"] = load_preset(base).flags | content["flags"]
    preset = Preset(**content)
    if unknown := sorted(preset.flags.keys() - defaults().keys()):
        raise UserError(f"{path}: there is no flag --{unknown[0]}.")
    return preset


def preset_flags(name: str | None) -> dict[str, Any]:
    """The flags of a preset, none without one. The model's config is found from any working directory."""
    if name is None:
        return {}
    flags = dict(load_preset(name).flags)
    config = flags.get("model_config")
    if config is not None and not Path(config).exists():
        flags["model_config"] = str(ROOT / config)
    return flags
