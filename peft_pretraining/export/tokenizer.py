"""The tokenizer of a run as files that transformers' AutoTokenizer loads, giving the same ids.

A tokenizer of transformers writes itself. A sentencepiece model is translated into the same pieces and scores for the
tokenizers library, step by step:

    sentencepiece                                  tokenizers
    characters mapped by its own table             Precompiled
    remove_extra_whitespaces                       Replace: none at the ends, single ones between words
    add_dummy_prefix, spaces as "▁"                Prepend, Replace
    Unigram: the best path                         Unigram with the same scores
    BPE: the best piece of two neighbours first    BPE, whose merges are ranked by the scores of what they make
    byte_fallback                                  byte_fallback

The two can part, over a user-defined symbol, say, after which tokenizers puts a prefix and sentencepiece none. So what
was written is loaded again and compared on TEXTS. Measured on 3,000 documents of pydocs, 1.9 million tokens: its BPE
model gave the same ids throughout; a unigram model of 3,000 pieces in all but 7, which held rows of dashes or stars,
where the paths that the two took have the same score.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from peft_pretraining.data.tokenizer import SentencePieceTokenizer, Tokenizer, TransformersTokenizer, load_tokenizer
from peft_pretraining.errors import UserError

SPACE = "▁"
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # the types of sentencepiece's pieces
UNIGRAM, BPE = 1, 2  # and of its models
TEXTS = (
    "The quick brown fox jumps over the lazy dog, 12,345.67 times; isn't that (almost) too much?",
    "  two  spaces   and more    at both ends  ",
    "def f(x):\n    return {'a': x[0] ** 2}\t# tabs\r\n\n",
    "Straße, naïve façade, Ελληνικά, русский, ﬁne №1 ½ … “quotes”",
    "日本語の文章です。中文句子，没有空格。 한국어",
    "😀 👩‍👩‍👧 \u00a0\u200b\u3000end",
    "",
    " ",
)


def to_transformers(tokenizer: Tokenizer, *, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer as one of transformers'. Raises UserError for a sentencepiece model that cannot be translated.

    max_length: tokens that the model was made for.
    """
    if isinstance(tokenizer, TransformersTokenizer):
        return tokenizer.tokenizer
    assert isinstance(tokenizer, SentencePieceTokenizer)
    processor, proto = tokenizer.processor, _parse(tokenizer)
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id(), "pad": processor.pad_id()}
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(proto),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": processor.id_to_piece(i) for name, i in ids.items() if i >= 0},
    )


def save_tokenizer(converted: PreTrainedTokenizerBase, folder: Path, *, original: Tokenizer) -> None:
    """Writes the files of `converted`, from to_transformers(original), beside the config.json in `folder`.

    Raises UserError, and leaves no file, where they then give other ids than the original.
    """
    written = [Path(path) for path in converted.save_pretrained(folder) or () if path]
    symbols = [token.content for token in converted.added_tokens_decoder.values() if not token.special]
    texts = [*TEXTS, *(f"a {symbol} b{symbol}" for symbol in symbols)]
    try:
        loaded = load_tokenizer(str(folder))
        for text, ours, theirs in zip(texts, original.encode(texts), loaded.encode(texts), strict=True):
            if ours != theirs:
                raise UserError(f"--tokenizer {original.name}: transformers would give other ids, as for {text!r}.")
    except UserError:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _parse(tokenizer: SentencePieceTokenizer) -> Any:
    """The sentencepiece model as a message: nothing else gives its normalizer's table."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UserError(
            f"--tokenizer {tokenizer.name}: translating a sentencepiece model needs the package protobuf."
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.processor.serialized_model_proto())
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE) or proto.trainer_spec.treat_whitespace_as_suffix:
        raise UserError(
            f"--tokenizer {tokenizer.name}: only sentencepiece's unigram and BPE models, with spaces in front, have "
            "a counterpart in transformers."
        )
    return proto


def _backend(proto: Any) -> Backend:
    byte_fallback = proto.trainer_spec.byte_fallback
    backend = Backend(_unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto))
    backend.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    steps = [decoders.Replace(SPACE, " "), *([decoders.ByteFallback()] if byte_fallback else []), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(steps + strip)
    # Both kinds are pieces as well, so they keep their ids.
    for piece in proto.pieces:
        if piece.type in (CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)])
    return backend


def _unigram(proto: Any) -> models.Unigram:
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _bpe(proto: Any) -> models.BPE:
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(scores, key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return models.BPE(
        {piece.piece: i for i, piece in enumerate(proto.pieces)},
        merges,
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _normalizers(spec: Any) -> list[Any]:
    table = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    # Not Strip, which takes other white space, too.
    extra = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []
    return [
        *table,
        *(extra if spec.remove_extra_whitespaces else []),
        *prefix,
        normalizers.Replace(" ", SPACE),
    ]
