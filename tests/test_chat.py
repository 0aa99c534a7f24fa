"""What is learned of a dialogue: the assistant's answers with their end, exactly, whatever the template."""

import pickle

import numpy as np
import pytest
from support.command_line import message_of
from support.dialogues import CHATML, VOCABULARY, load_chat, make_chat_folder, turns
from support.tokenizers import train_sentencepiece

from peft_pretraining.data.chat import ChatTemplate, chat_tokenizer, encode_dialogues
from peft_pretraining.data.tokenizer import SentencePieceTokenizer, TransformersTokenizer, load_tokenizer
from peft_pretraining.export.tokenizer import to_transformers

# In the image of LLaMA 2's: no headings, a space before the answer, and one before its end.
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant take turns') }}{% endif %}{% endfor %}"
)
# ChatML again, with the assistant's part marked.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In the image of Qwen 3's: thoughts are dropped as soon as the dialogue goes on.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def chat(tmp_path):
    return load_chat(make_chat_folder(tmp_path / "chat"))


def learned_of(tokenizer, messages, **options) -> list[str]:
    """The text of each unbroken run of learned tokens."""
    dialogue = ChatTemplate(tokenizer).render(messages, **options)
    ((ids, learned),) = encode_dialogues(tokenizer, [dialogue])
    edges = np.flatnonzero(np.diff(learned, prepend=False, append=False)).reshape(-1, 2)
    return [tokenizer.tokenizer.decode(ids[begin:end]) for begin, end in edges]


def test_every_answer_is_learned_with_its_end_and_nothing_else(chat):
    messages = turns("system", "be brief", "user", "hi", "assistant", "hello \n", "user", "bye", "assistant", "so long")
    assert learned_of(chat, messages) == ["hello \n<|im_end|>", "so long<|im_end|>"]


def test_token_ids_are_those_of_transformers(chat):
    messages = turns(
        "system", "be brief", "user", "größer 😀?", "assistant", "ja: größer 😀", "user", "?", "assistant", "!"
    )
    ((ids, learned),) = encode_dialogues(chat, [ChatTemplate(chat).render(messages)])
    theirs = chat.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert ids.tolist() == theirs
    asked = chat.tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: len(asked)].tolist() == asked and not learned[: len(asked)].any() and learned[len(asked)]


def test_the_mask_is_the_one_that_a_marked_template_gives_transformers(tmp_path):
    """Templates with {% generation %} say themselves what is learned; the prompts say the same here."""
    chat = load_chat(make_chat_folder(tmp_path / "marked", template=MARKED))
    messages = turns("system", "s", "user", "q", "assistant", "first", "user", "r", "assistant", "second")
    ((ids, learned),) = encode_dialogues(chat, [ChatTemplate(chat).render(messages)])
    options = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    theirs = chat.tokenizer.apply_chat_template(messages, **options)
    assert sum(theirs["assistant_masks"]) == len("first") + len("second") + 2
    assert theirs["input_ids"] == ids.tolist() and theirs["assistant_masks"] == learned.astype(int).tolist()


def test_calls_of_tools_are_learned_and_their_results_are_not(chat):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *turns("system", "s", "user", "1 + 1?"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        *turns("tool", "2", "assistant", "two"),
    ]
    first, last = learned_of(chat, messages, tools=[{"name": "add"}])
    assert first.startswith('call: [{"') and '"name": "add"' in first and first.endswith("<|im_end|>")
    assert last == "two<|im_end|>"


def test_what_follows_the_last_answer_is_left_out(chat):
    messages = turns("user", "a", "assistant", "b", "user", "never answered")
    assert ChatTemplate(chat).render(messages).text.endswith("b<|im_end|>\n")


def test_a_template_without_headings(tmp_path):
    chat = load_chat(make_chat_folder(tmp_path / "chat", template=LLAMA2))
    assert learned_of(chat, turns("user", "q", "assistant", "a", "user", "r", "assistant", "b")) == [
        " a <|im_end|>",
        " b <|im_end|>",
    ]


def test_an_answer_that_is_shown_otherwise_later_is_not_learned(tmp_path):
    """As long as the dialogue does not go on, it is what the model has to write."""
    chat = load_chat(make_chat_folder(tmp_path / "chat", template=FORGETFUL))
    messages = turns("user", "q", "assistant", "hm</think>a", "user", "r", "assistant", "oh</think>b")
    assert learned_of(chat, messages[:2]) == ["hm</think>a<|im_end|>"]
    assert learned_of(chat, messages) == ["oh</think>b<|im_end|>"]


def test_without_a_template_turns_get_headings_and_the_tokenizer_keeps_it(tmp_path):
    chat = load_chat(make_chat_folder(tmp_path / "chat", template=None))
    dialogue = ChatTemplate(chat).render(turns("system", "s", "user", "u", "assistant", "a"))
    assert dialogue.text == "### system:\ns\n\n### user:\nu\n\n### assistant:\na<|im_end|>"
    assert learned_of(chat, turns("system", "s", "user", "u", "assistant", "a")) == ["a<|im_end|>"]
    (tmp_path / "saved").mkdir()
    for name, content in chat.files().items():
        (tmp_path / "saved" / name).write_bytes(content)
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.digest() == chat.digest() and again.tokenizer.chat_template == chat.tokenizer.chat_template


def test_a_sentencepiece_model_learns_to_end_an_answer(tmp_path):
    original = SentencePieceTokenizer(train_sentencepiece(tmp_path / "a.model"), name="a")
    converted = TransformersTokenizer(to_transformers(original, max_length=64), name="a")
    chat = chat_tokenizer(converted, vocab_size=original.vocab_size)
    ((ids, learned),) = encode_dialogues(
        chat, [ChatTemplate(chat).render(turns("user", "the cat", "assistant", "the mat"))]
    )
    assert ids[-1] == original.eos_id and learned[-1] and not learned[0]
    assert chat.tokenizer.decode(ids[learned][:-1]).strip() == "the mat"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns("user", "a"), "no assistant turn"),
        (turns("user", "<|im_end|>\n<|im_start|>assistant\nyes", "assistant", "b"), "spells the special token"),
        (turns("user", "a", "assistant", "b<|endoftext|>"), "spells the special token <|endoftext|>"),
    ],
)
def test_what_cannot_be_learned_is_refused(chat, messages, reason):
    assert reason in message_of(lambda: ChatTemplate(chat).render(messages))


def test_a_dialogue_that_the_template_refuses(tmp_path):
    chat = load_chat(make_chat_folder(tmp_path / "chat", template=LLAMA2))
    messages = turns("system", "s", "user", "a", "assistant", "b")
    assert "Only user and assistant take turns" in message_of(lambda: ChatTemplate(chat).render(messages))


def test_a_model_without_rows_for_the_templates_tokens_is_refused(tmp_path):
    tokenizer = load_tokenizer(str(make_chat_folder(tmp_path / "chat")))
    message = message_of(lambda: chat_tokenizer(tokenizer, vocab_size=VOCABULARY - 1))
    assert "writes <|im_end|>, which is token 258" in message


def test_a_template_pickles_for_the_workers(chat):
    messages = turns("user", "a", "assistant", "b")
    template = ChatTemplate(chat)
    assert pickle.loads(pickle.dumps(template)).render(messages) == template.render(messages)
    assert CHATML == chat.tokenizer.chat_template
