"""The one exception whose message is written for the user."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line: what is wrong, and what to do about it. The main script prints it after `error: ` and exits
    with status 2, without a traceback.
    """

    on_one_rank = False  # True if it was raised at a time when perhaps only this rank knows of it


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")
