"""Files that hold one JSON object: written by people, such as a model's shape, or by a program, such as a manifest."""

import json
from pathlib import Path
from typing import Any

from peft_pretraining.errors import UserError


def read_json(path: Path, *, advice: str | None = None) -> dict[str, Any]:
    """Reads the object in a JSON file. Raises UserError if there is no file, no valid JSON or no object.

    advice: what the user can do about a broken file that a program has written. None stands for a file that people
        write: the message then names the place of the mistake, or the files that do exist.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        if advice is None:
            raise UserError(_describe(error, path)) from error
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise UserError(f"{path}: cannot be read ({reason}). {advice}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object is needed, not a {type(value).__name__}. {advice or ''}".rstrip())
    return value


def _describe(error: Exception, path: Path) -> str:
    """One line for the person who has written the file, or has mistyped its name."""
    if isinstance(error, json.JSONDecodeError):
        return f"{path} line {error.lineno}, column {error.colno}: not valid JSON ({error.msg})."
    if isinstance(error, UnicodeDecodeError):
        return f"{path}: not a text file in UTF-8."
    if isinstance(error, OSError):
        known = ", ".join(sorted(file.name for file in path.parent.glob("*.json") if file != path))
        advice = f"There are: {known}." if known else f"There is no JSON file in {path.parent}."
        return f"{path}: cannot be read ({error.strerror}). {advice}"
    return f"{path}: JSON nested too deeply, or numbers too long."
