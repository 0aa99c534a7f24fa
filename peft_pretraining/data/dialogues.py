"""Dialogues in files: what a record may look like, and what can be wrong with it.

messages                       a list of turns with role and content, and `tools` where the template knows them
prompt, completion             a question and its answer, with `system` in front if there is one
instruction, input, output     the same; the input, if any, follows the instruction after a blank line
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from peft_pretraining.data.chat import ROLES, ChatTemplate, Message
from peft_pretraining.data.order import Dialogue
from peft_pretraining.data.records import Record, read_records, without_surrogates
from peft_pretraining.errors import UserError


class DialogueRecord(NamedTuple):
    """A record that holds a dialogue, not yet decoded."""

    record: Record
    template: ChatTemplate

    @property
    def line(self) -> int:
        return self.record.line

    @property
    def size(self) -> int:
        return self.record.size

    def text(self) -> Dialogue:
        """The dialogue, rendered. Raises UserError with the file and the line for one that cannot be trained on."""
        fields = self.record.fields()
        try:
            return self.template.render(messages_of(fields), tools=_tools(fields))
        except UserError as error:
            raise UserError(f"{self.record.where}: {error}.") from error


def read_dialogues(path: Path, template: ChatTemplate, *, line: int = 1) -> Iterator[DialogueRecord]:
    """The dialogues of one file, in file order, from the one at `line` on. See read_records."""
    return (DialogueRecord(record, template) for record in read_records(path, line=line, text_field=None))


def messages_of(fields: dict[str, Any]) -> list[Message]:
    """The turns of a record. Raises UserError that says what is missing or wrong."""
    for form, build in FORMS.items():
        if fields.get(form) is not None:
            return build(fields)
    found = ", ".join(fields)[:100].encode("unicode_escape").decode() or "none"
    raise UserError(
        f"no dialogue (fields: {found}): give messages, or prompt and completion, or instruction and output"
    )


def _messages(fields: dict[str, Any]) -> list[Message]:
    messages = fields["messages"]
    if not isinstance(messages, list):
        raise UserError(f'"messages" is not a list but {_show(messages)}')
    if not messages:
        raise UserError('"messages" is empty')
    return [_checked(message, number) for number, message in enumerate(messages, start=1)]


def _checked(message: Any, number: int) -> Message:
    """One turn, without its empty fields, which a table has for what other turns have."""
    if not isinstance(message, dict):
        raise UserError(f"message {number} is not an object but {_show(message)}")
    if not isinstance(role := message.get("role"), str):
        raise UserError(f"message {number} has no role")
    if role not in ROLES:
        raise UserError(f'message {number} has the unknown role "{role[:40]}" (known: {", ".join(ROLES)})')
    kept = {name: value for name, value in message.items() if value is not None}
    calls = role == "assistant" and bool(kept.get("tool_calls"))
    content = kept.get("content", "" if calls else None)
    if not isinstance(content, str):
        raise UserError(f"the content of message {number} is not a string but {_show(content)}")
    if role == "assistant" and not content.strip() and not calls:
        raise UserError(f"message {number}, an answer, is empty")
    return kept | {"content": without_surrogates(content)}


def _pair(question: str, answer: str) -> Callable[[dict[str, Any]], list[Message]]:
    def build(fields: dict[str, Any]) -> list[Message]:
        asked = _string(fields, question)
        if further := fields.get("input") if question == "instruction" else None:
            asked = f"{asked}\n\n{_string(fields, 'input')}" if asked else str(further)
        turns = [("system", _string(fields, "system"))] if fields.get("system") else []
        turns += [("user", asked), ("assistant", _string(fields, answer))]
        if not turns[-1][1].strip():
            raise UserError(f'"{answer}" is empty')
        return [{"role": role, "content": content} for role, content in turns]

    return build


# How a record is read, by the field that tells its form. The first that is there counts.
FORMS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _messages,
    "prompt": _pair("prompt", "completion"),
    "instruction": _pair("instruction", "output"),
}


def _string(fields: dict[str, Any], name: str) -> str:
    if not isinstance(value := fields.get(name), str):
        raise UserError(f'"{name}" is not a string but {_show(value)}')
    return without_surrogates(value)


def _tools(fields: dict[str, Any]) -> list[Any] | None:
    """What the tools are that the assistant may call: a list, or JSON of one, as tables have it."""
    tools = fields.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "null")
        except ValueError:
            raise UserError(f'"tools" is not valid JSON: {_show(tools)}') from None
    if tools is not None and not isinstance(tools, list):
        raise UserError(f'"tools" is not a list but {_show(tools)}')
    return tools or None


def _show(value: Any) -> str:
    return json.dumps(value, default=str)[:40]
