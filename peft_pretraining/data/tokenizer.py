"""Tokenizers of every origin behind one small interface.

Two classes: sentencepiece models are read by sentencepiece itself, everything else by transformers. Neither appends
special tokens, and neither lets a document forge one: "</s>" inside a text is four characters, not an end of document.
Both can be pickled, so they travel to DataLoader workers.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

from peft_pretraining.data import pydocs
from peft_pretraining.errors import UserError
from peft_pretraining.progress import LongWait

OFFLINE_WAYS = (
    "--tokenizer PATH.model (sentencepiece), --tokenizer FOLDER (transformers), "
    "or, with no data at hand either, --dataset pydocs --tokenizer pydocs"
)
HUB_TIMEOUT = 5.0  # seconds
SAMPLE = "The quick  brown fox;\n\tnaïve façade, Ελληνικά, 日本語, ﬁ ½ 12,345.67 😀 don't re-read CamelCase __init__()"


class Tokenizer(Protocol):
    """What the data loader and the main script need to know of a tokenizer."""

    name: str  # as the user gave it
    vocab_size: int  # 1 + the largest id that encode() returns, or eos_id, or pad_id
    bos_id: int | None
    eos_id: int
    pad_id: int  # eos_id if there is no token for padding

    def files(self) -> dict[str, bytes]:
        """The files that the tokenizer is made of, by name: in a folder, load_tokenizer makes the same one of them."""
        ...

    def digest(self) -> str:
        """A hash that two tokenizers share if they give the same ids."""
        ...

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of every text, all below vocab_size, with no special tokens appended."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`; special tokens and ids that the tokenizer does not know are left out."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `spec` names.

    spec: "pydocs" (the embedded corpus' own), the path of a sentencepiece model, a transformers tokenizer folder, or a
    name on the Hugging Face hub.  Raises UserError if it cannot be found, reached or used.
    """
    if spec == "pydocs":
        return SentencePieceTokenizer(pydocs.pydocs_tokenizer_model(), name=spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        return _load_folder(path, name=spec)
    if path.exists():
        return SentencePieceTokenizer(path, name=spec)
    if path.suffix in (".model", ".json") or path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise UserError(f"--tokenizer {spec}: no such file or folder.")
    return _load_from_hub(spec)


def check_fits(tokenizer: Tokenizer, *, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has ids that a model with `vocab_size` embeddings has no row for."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"--tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model's vocabulary only "
            f"{vocab_size}. Set vocab_size in the model's config to at least {tokenizer.vocab_size}, or choose a "
            "tokenizer with a smaller vocabulary."
        )


class SentencePieceTokenizer:
    """A sentencepiece `.model` file. Pickles as the bytes of the model: workers need not see the file."""

    def __init__(self, path: Path, *, name: str) -> None:
        import sentencepiece

        try:
            model = path.read_bytes() or b"no model"  # sentencepiece takes an empty file for a model without pieces
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except OSError as error:
            raise UserError(f"--tokenizer {name}: cannot be read ({error.strerror}).") from error
        except RuntimeError as error:
            raise UserError(
                f"--tokenizer {name}: not a sentencepiece model, or a damaged one. "
                "For a transformers tokenizer, give its folder."
            ) from error
        self.name = name
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_id = self.processor.eos_id()
        if self.eos_id < 0:
            raise _no_eos(name)
        self.pad_id = self.processor.pad_id() if self.processor.pad_id() >= 0 else self.eos_id
        self.vocab_size = self.processor.vocab_size()

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self.processor.serialized_model_proto()}

    def digest(self) -> str:
        return hashlib.sha256(self.processor.serialized_model_proto()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        # One thread: 6M tokens a second are enough, and the workers of the data loader are parallel already.
        return self.processor.encode(texts, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.vocab_size])


class TransformersTokenizer:
    """A tokenizer of the transformers library.

    Its special tokens that no ordinary text can produce, as T5's 100 sentinels, are not counted in the vocabulary:
    T5's 32000 pieces fit a model of 32000.
    """

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(tokenizer.all_special_ids)
        ordinary = set(tokenizer.get_vocab().values()) - special
        if len(ordinary) <= 1:  # transformers makes up a vocabulary of special tokens (and a space) where it finds none
            raise UserError(
                f"--tokenizer {name}: transformers finds no vocabulary there. "
                "If there is a sentencepiece model, give its path: --tokenizer PATH.model."
            )
        if tokenizer.eos_token_id is None:
            raise _no_eos(name)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.vocab_size = 1 + max(*ordinary, self.eos_id, self.pad_id, tokenizer.unk_token_id or 0)
        forged = special - {tokenizer.unk_token_id, None}  # texts may well have unknown characters
        self._spelled = {i: self._spell(tokenizer.convert_ids_to_tokens(i), forged) for i in forged}

    def files(self) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}

    def digest(self) -> str:
        """A hash of the vocabulary and of the ids of SAMPLE; other versions of transformers write other files."""
        known = [sorted(self.tokenizer.get_vocab().items()), self.encode([SAMPLE]), self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [self._without_special(ids) for ids in self._ids(texts)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i < self.vocab_size], skip_special_tokens=True)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # documents longer than some model's context are welcome
        )["input_ids"]

    def _spell(self, token: str, forged: set[int]) -> list[int]:
        """The ids of a special token's letters, cut in two so that it is not recognized."""
        return [i for ids in self._ids([token[:1], token[1:]]) for i in ids if i not in forged]

    def _without_special(self, ids: list[int]) -> list[int]:
        # split_special_tokens is not enough: a Unigram model that has the sentinels among its pieces (T5's) finds them.
        if self._spelled.keys().isdisjoint(ids):
            return ids
        return [part for i in ids for part in self._spelled.get(i, [i])]


def _load_folder(folder: Path, *, name: str) -> Tokenizer:
    """The tokenizer in `folder`. A folder with only a sentencepiece model is one that transformers may misread."""
    if not (folder / "tokenizer.json").is_file():
        models = sorted(folder.glob("*.model"))
        if models:
            return SentencePieceTokenizer(models[0], name=name)
        if not any(folder.glob("vocab*")):
            raise UserError(f"--tokenizer {name}: the folder holds no tokenizer (tokenizer.json, *.model or vocab.*).")
    return _load_by_transformers(str(folder), name=name, local=True)


def _load_from_hub(name: str) -> Tokenizer:
    """The tokenizer from the hub or, where that cannot be reached, from what an earlier run left in the local cache."""
    reachable = _hub_reachable()
    try:
        with LongWait(f"loading the tokenizer {name}"):
            return _load_by_transformers(name, name=name, local=not reachable)
    except UserError as error:
        if reachable:
            raise
        raise UserError(
            f"--tokenizer {name}: no file or folder of that name, not in the local cache, and the Hugging Face hub "
            f"cannot be reached. Without the hub: {OFFLINE_WAYS}."
        ) from error


def _hub_reachable() -> bool:
    """Asks the hub once; transformers would ask for most of a minute before it gives up."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception:  # whatever stands in the way: offline mode, no network, a proxy, a certificate
        return False
    return True


def _load_by_transformers(source: str, *, name: str, local: bool) -> Tokenizer:
    # Set before the first batch: forked workers of the data loader would each warn that they turn the threads off.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # the libraries below raise many kinds, plain Exception among them
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--tokenizer {name}: transformers cannot load it ({reason}).") from error
    return TransformersTokenizer(tokenizer, name=name)


def _no_eos(name: str) -> UserError:
    return UserError(
        f"--tokenizer {name} has no end-of-sequence token, which is what separates documents. Choose one that has it."
    )
