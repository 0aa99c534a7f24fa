"""The sink that says, after an evaluation, whether a run is where its preset was after as many updates."""

import argparse
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from loguru import logger

from peft_pretraining.cli.presets import ROOT, Preset, load_preset

TOLERANCE = 0.03  # seeds of the long runs in docs/results.md differ by 1%, of short ones by up to 5%


class ExpectationSink:
    """Compares perplexities with those that a preset's own run had.

    name: the preset's name.
    perplexity: what was measured, by the number of updates.
    """

    def __init__(self, name: str, *, perplexity: Mapping[int, float]) -> None:
        self.name, self.perplexity = name, dict(perplexity)

    def event(self, name: str, fields: dict[str, Any]) -> None:
        """See Sink."""
        if name != "eval" or fields["update"] not in self.perplexity:
            return
        expected = self.perplexity[fields["update"]]
        behind = fields["perplexity"] / expected - 1
        told = f"--preset {self.name} was at perplexity {expected:.2f} after {fields['update']} updates"
        if behind > TOLERANCE:
            logger.warning(f"behind: {told}, so this run is {behind:.1%} above it")
        else:
            logger.info(f"as expected: {told}")

    def close(self) -> None:
        """See Sink."""


def expectation_sinks(args: argparse.Namespace, *, validation: Mapping[str, str]) -> list[ExpectationSink]:
    """The sink, or none where nothing was measured with these flags on this text.

    validation: the fingerprint of the validation documents.
    """
    if args.preset is None:
        return []
    preset = load_preset(args.preset)
    if preset.expected is None or preset.expected["validation"] != digest(validation) or _changed(preset, args):
        return []
    measured = {int(update): value for update, value in preset.expected["perplexity"].items()}
    return [ExpectationSink(args.preset, perplexity=measured)]


def digest(fingerprint: Mapping[str, str]) -> str:
    """A fingerprint of data as a short text, which does not depend on where the files are."""
    return hashlib.blake2b(json.dumps(sorted(fingerprint.items())).encode(), digest_size=8).hexdigest()


def _changed(preset: Preset, args: argparse.Namespace) -> bool:
    """Whether the command line has changed a flag of the preset."""
    given = vars(args) | {"model_config": str(args.model_config).removeprefix(f"{ROOT}/")}
    return any(given[name] != value for name, value in preset.flags.items())
