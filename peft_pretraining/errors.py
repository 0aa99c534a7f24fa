"""The one exception whose message is written for the user."""

import argparse
import difflib
import errno
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is one line: what is wrong, and what to do about it. The main script prints it after `error: ` and exits
    with status 2, without a traceback.
    """

    on_one_rank: bool | None = None  # True if perhaps only this rank knows of it, False if all do; None: not known


def command_status(main: Callable[[], object]) -> int:
    """Runs a command of one process. Returns its status: 2, after one line on stderr, for what the user can repair.

    Any other error is raised. Runs that train have training/exit_status.py, which knows other processes and signals.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (told := unusable_path(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def unusable_path(error: OSError) -> str | None:
    """One line if a path cannot be what it was given for, whatever is tried with it; None for any other error."""
    if error.filename is None or error.errno not in (errno.EACCES, errno.ENAMETOOLONG):
        return None
    advice = "shorter name" if error.errno == errno.ENAMETOOLONG else "path that this user may use"
    return f"{str(error.filename)[:200]}: {error.strerror}. Give a {advice}."


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError instead of printing its usage and leaving.

    In the name of a flag, - and _ are alike.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See --help.")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parses a command line. Raises UserError, with a suggestion for a misspelt flag."""
        args = sys.argv[1:] if args is None else args
        for text in args:
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                shown = text.encode("ascii", "backslashreplace").decode()
                self.error(f"{shown} has letters that this system's locale does not know: set PYTHONUTF8=1")
        known, unknown = self.parse_known_args([self._as_declared(text) for text in args], namespace)
        if flags := [text for text in unknown if text.startswith("--")]:
            self.error(". ".join(map(self._unknown, flags)))
        if unknown:
            self.error(f"unexpected {', '.join(map(repr, unknown))}: every value needs a flag before it")
        return known

    def _as_declared(self, text: str) -> str:
        """The text with a flag's name as it was declared; as it is if it has no such name."""
        name, equals, value = text.partition("=")
        if not name.startswith("--"):
            return text
        declared = {flag[2:].replace("-", "_"): flag for flag in self._option_string_actions}
        return declared.get(name[2:].replace("-", "_"), name) + equals + value

    def _unknown(self, flag: str) -> str:
        name = flag.partition("=")[0]
        close = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"unknown flag {name}" + (f" (did you mean {close[0]}?)" if close else "")
