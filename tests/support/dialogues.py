"""Dialogues, files of them, and a tokenizer folder whose chat template has turns of every role."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_pretraining.data.chat import chat_tokenizer
from peft_pretraining.data.tokenizer import TransformersTokenizer, load_tokenizer
from support.tokenizers import write_config

# In the image of ChatML, as Qwen has it: what tools there are stands in front, a tool's answer is a user's turn.
CHATML = (
    "{% if tools %}{{ '<|im_start|>system\\ntools: ' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' + message.content }}"
    "{% if message.tool_calls %}{{ 'call: ' + (message.tool_calls | tojson) }}{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL)


def make_chat_folder(folder: Path, *, template: str | None = CHATML) -> Path:
    """A tokenizer of bytes with three special tokens, and a template, or none."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    write_config(
        folder, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=list(SPECIAL[1:2])
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def load_chat(folder: Path) -> TransformersTokenizer:
    """The tokenizer of a folder, with a template."""
    return chat_tokenizer(load_tokenizer(str(folder)), vocab_size=VOCABULARY)


def turns(*pairs: str) -> list[dict]:
    """Messages from alternating roles and contents."""
    return [{"role": role, "content": content} for role, content in zip(pairs[::2], pairs[1::2], strict=True)]


def write_dialogues(path: Path, records: list[dict]) -> Path:
    """A file with a record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sums(count: int, *, first: int = 0) -> list[dict]:
    """Records of one or two questions with short answers, each another."""
    return [
        {"messages": turns("user", f"{i} + 1?", "assistant", f"It is {i + 1}.")
         + (turns("user", "and then?", "assistant", f"{i + 2}") if i % 3 == 0 else [])}
        for i in range(first, first + count)
    ]  # fmt: skip
