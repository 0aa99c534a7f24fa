"""The one exception that speaks to the user."""

import argparse
from typing import NoReturn


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is the whole report: one line that says what was wrong and what to do about it. The main script prints
    it after `error: ` and exits with status 2, without a traceback.
    on_one_rank: whether it was raised after the ranks had parted ways, so that perhaps only this one knows of it.
    """

    on_one_rank = False


class Parser(argparse.ArgumentParser):
    """Whose complaints are UserErrors: one line, no usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")
