"""Messages to one text by a chat template, and which characters of it a model is to learn: the assistant's answers.

What is learned of a turn is what the model would have to write when it is asked: everything between the prompt that the
template makes of the messages before (`add_generation_prompt`) and the end of the turn, its end token included. White
space that a template puts between turns is not learned.

The text is tokenized as a whole, so token ids are those that transformers' `apply_chat_template` gives. A token is
learned if any of its characters belong to an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from loguru import logger

from peft_pretraining.data.order import Dialogue
from peft_pretraining.data.tokenizer import Tokenizer, TransformersTokenizer
from peft_pretraining.errors import UserError

Message = dict[str, Any]  # role, content, and whatever else the template understands

ROLES = ("system", "developer", "user", "assistant", "tool")
# For tokenizers that bring none. Every turn has a heading, and an answer ends with the end-of-sequence token.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + ':\\n' + (message['content'] or '') }}"
    "{% if message.get('tool_calls') %}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
)
SAMPLE = [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]


class ChatTemplate:
    """The chat template of a tokenizer. Pickles, so that workers render."""

    def __init__(self, tokenizer: TransformersTokenizer) -> None:
        self.tokenizer = tokenizer.tokenizer
        self.special = sorted(set(self.tokenizer.all_special_tokens))

    def render(self, messages: Sequence[Message], *, tools: list[Any] | None = None) -> Dialogue:
        """The dialogue up to its last answer, and where its answers are.

        Raises UserError, to be completed with the place, if there is no answer, if a message spells a special token,
        or if the template refuses the messages.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            raise UserError("no assistant turn: there is nothing to learn")
        self._refuse_forged(messages)
        text = self._text(messages[: answers[-1] + 1], tools=tools)
        spans = [span for i in answers if (span := self._span(messages, i, text=text, tools=tools))]
        if not spans:
            raise UserError(
                "the chat template does not show where an answer begins: no prompt is the start of the text"
            )
        return Dialogue(text, tuple(spans))

    def _span(
        self, messages: Sequence[Message], turn: int, *, text: str, tools: list[Any] | None
    ) -> tuple[int, int] | None:
        """Begin and end of an answer in the text.

        None for an answer that the template shows otherwise once the dialogue goes on, as those do that drop the
        thoughts of earlier turns: a model is never asked to write it so.
        """
        prompt = self._text(messages[:turn], tools=tools, add_generation_prompt=True)
        answered = self._text(messages[: turn + 1], tools=tools)
        if not (answered.startswith(prompt) and text.startswith(answered)):
            return None
        end = len(answered.rstrip())
        return (len(prompt), end) if end > len(prompt) else None

    def _text(self, messages: Sequence[Message], **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception as error:  # whatever a template raises or stumbles over
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"the chat template refuses it ({reason})") from error

    def _refuse_forged(self, messages: Sequence[Message]) -> None:
        """A text that spells a special token would end its turn, or begin another one."""
        for text in _strings(messages):
            if forged := next((token for token in self.special if token in text), None):
                raise UserError(f"a message spells the special token {forged}: write it otherwise")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)


def encode_dialogues(tokenizer: Tokenizer, dialogues: Sequence[Dialogue]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each dialogue its token ids, int32, and which of them are to be learned, bool; both (n,)."""
    assert isinstance(tokenizer, TransformersTokenizer)
    found = tokenizer.tokenizer(
        [dialogue.text for dialogue in dialogues],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        (np.array(ids, dtype=np.int32), _learned(offsets, dialogue.answers))
        for ids, offsets, dialogue in zip(found["input_ids"], found["offset_mapping"], dialogues, strict=True)
    ]


def _learned(offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens have a character in an answer.

    offsets: begin and end of each token in the text.
    """
    begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T  # (n,)
    learned = np.zeros(len(offsets), dtype=bool)
    for begin, end in answers:
        learned |= (begins < end) & (ends > begin)
    return learned


def chat_tokenizer(tokenizer: Tokenizer, *, vocab_size: int) -> TransformersTokenizer:
    """The tokenizer with a chat template: its own, else DEFAULT_TEMPLATE, which is then saved with it.

    tokenizer: one of transformers', see export.tokenizer.to_transformers.
    vocab_size: rows of the model's embedding.
    Raises UserError if the tokenizer cannot say where its tokens are in a text, or if the template writes a special
    token that the model has no row for.
    """
    assert isinstance(tokenizer, TransformersTokenizer)
    inner = tokenizer.tokenizer
    if not inner.is_fast:
        raise UserError(f"--tokenizer {tokenizer.name}: --task sft needs a folder with a tokenizer.json.")
    if not inner.chat_template:
        logger.info(
            f"{tokenizer.name} has no chat template: turns get headings such as '### user:', see docs/finetuning.md"
        )
        inner.chat_template = DEFAULT_TEMPLATE
    dialogue = ChatTemplate(tokenizer).render(SAMPLE)
    (ids, learned), *_ = encode_dialogues(tokenizer, [dialogue])
    if not learned.any() or learned[0]:
        raise UserError(f"--tokenizer {tokenizer.name}: no answer can be told from its prompt in {dialogue.text!r}.")
    if ids[learned][-1] not in inner.all_special_ids:
        logger.warning(f"the chat template ends an answer with no special token: {dialogue.text!r}")
    written = {i for i, token in inner.added_tokens_decoder.items() if token.content in str(inner.chat_template)}
    if (largest := max({*ids.tolist(), *written})) >= vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer.name}: its chat template writes {inner.convert_ids_to_tokens(largest)}, which is "
            f"token {largest}, but the model's vocabulary has only {vocab_size}."
        )
    return tokenizer
