"""Trains a sentencepiece tokenizer on texts: that of the embedded corpus, and those of scripts/train_tokenizer.py."""

import io
from collections.abc import Iterable, Sequence

from peft_pretraining.errors import UserError


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """A sentencepiece model of so many tokens. The same texts give the same bytes.

    The text is kept as it is: newlines are tokens, runs of spaces may be, unseen characters fall back to bytes, so
    decoding gives back exactly what was encoded. BPE, because on the embedded corpus it needs as many tokens as a
    unigram model (3.14 characters each) and trains in a tenth of the time.
    Raises UserError if the texts have too few different pieces for such a vocabulary, or if it is too small.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            max_sentence_length=1 << 16,
            num_threads=1,  # the result may depend on it
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:  # sentencepiece's own message names its source file
        raise UserError(
            f"no tokenizer of {vocab_size} tokens can be trained on these texts ({error}). It needs 260 or more, and "
            "at most as many as the texts have different pieces."
        ) from error
    return model.getvalue()


def count_tokens(model: bytes, texts: Sequence[str]) -> int:
    """How many tokens a sentencepiece model makes of the texts."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return sum(map(len, processor.encode(list(texts), num_threads=1)))
