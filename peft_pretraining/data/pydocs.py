"""The embedded corpus: the documentation that every machine with torch already has.

English documentation strings of Python's standard library, torch and numpy are read from the installed source files
with `ast`; nothing is imported. One class, with its methods, is one document, and so are the functions of one module.
Every docstring is kept once, so a text cannot sit in both splits.

Corpus and tokenizer are built at first use, into one folder of the user's cache that appears whole or not at all::

    qgalore/pydocs-<fingerprint>/train.jsonl.gz  validation.jsonl.gz  tokenizer.model
"""

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import shutil
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock
from loguru import logger

from peft_pretraining.data.tokenizer_training import count_tokens, train_tokenizer
from peft_pretraining.errors import UserError
from peft_pretraining.progress import LongWait

FORMAT_VERSION = 1  # raise it when the same sources would give another corpus
PACKAGES = ("torch", "numpy")
SPLITS = ("train", "validation")
VALIDATION_PERCENT = 4
VOCAB_SIZE = 4096
MIN_DOCUMENT = 200  # characters

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "_internal", "site-packages", "dist-packages", "__pycache__"}
ADDERS = {"add_docstr", "_add_docstr", "add_docstr_all", "add_newdoc"}  # how C functions get their docstrings
SCOPES = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def pydocs_files(split: str) -> list[Path]:
    """The files of one split, "train" or "validation": gzipped JSON lines with one field, "text".

    Builds the corpus where it is missing (half a minute). Raises UserError if no folder can be written to.
    """
    assert split in SPLITS, split
    return [_corpus_folder() / f"{split}.jsonl.gz"]


def pydocs_tokenizer_model() -> Path:
    """The corpus' own sentencepiece model of 4096 pieces, trained on the train split. Builds like `pydocs_files`."""
    return _corpus_folder() / "tokenizer.model"


# ---- Where it is kept ------------------------------------------------------------------------------------------------


def _corpus_folder() -> Path:
    """The folder that holds the corpus, in the user's cache or, where that cannot be written to, among temp files."""
    roots = source_roots()
    name = f"pydocs-{_fingerprint(roots)}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "qgalore"
    try:
        return ensure_built(cache / name, roots=roots)
    except OSError as error:
        user = os.getuid() if hasattr(os, "getuid") else 0
        spare = Path(tempfile.gettempdir()) / f"qgalore-{user}"
        logger.warning(f"Cannot write to the cache folder {cache} ({error}); using {spare}.")
    try:
        return ensure_built(spare / name, roots=roots)
    except OSError as error:
        raise UserError(
            f"pydocs needs a folder for its corpus, and neither {cache} nor {spare} can be written to ({error}). "
            "Set XDG_CACHE_HOME to one that can."
        ) from error


def _fingerprint(roots: Mapping[str, Path]) -> str:
    """Names a corpus by what it is made of: Python, package and format versions."""
    versions = [f"python {platform.python_version()}", f"format {FORMAT_VERSION}"]
    versions += [f"{name} {_version(name)}" for name in roots if name]
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def source_roots() -> dict[str, Path]:
    """The source folders by the name their modules start with ("" for the standard library), packages as installed."""
    roots = {"": Path(sysconfig.get_paths()["stdlib"])}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)  # locates a top-level package without importing it
        if spec is not None and spec.submodule_search_locations:
            roots[package] = Path(spec.submodule_search_locations[0])
    return roots


# ---- Building --------------------------------------------------------------------------------------------------------


def ensure_built(folder: Path, *, roots: Mapping[str, Path], vocab_size: int = VOCAB_SIZE) -> Path:
    """Builds corpus and tokenizer into `folder` unless they are there; returns `folder`.

    Any number of processes may call this at once: one builds and the others wait. The folder is renamed into place when
    it is complete, so a process that dies leaves no half corpus, even on file systems where the lock does not hold.
    Raises OSError if the folder cannot be written, UserError where `roots` hold no documentation.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _build(partial, roots=roots, vocab_size=vocab_size)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another machine was first: as good as ours
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _build(folder: Path, *, roots: Mapping[str, Path], vocab_size: int) -> None:
    sources = ", ".join(f"{name or 'Python'} {_version(name) if name else platform.python_version()}" for name in roots)
    logger.info(f"Building the embedded corpus from the docstrings of {sources} (once, about half a minute).")
    start = time.perf_counter()
    texts = documents(roots)
    splits = {split: [text for text in texts if split_of(text) == split] for split in SPLITS}
    if not splits["train"]:
        raise UserError("pydocs found no docstrings: the sources of Python and torch are not installed.")
    for split in SPLITS:
        _write_lines(folder / f"{split}.jsonl.gz", splits[split])
    with LongWait("training the tokenizer"):
        model = train_tokenizer(splits["train"], vocab_size=vocab_size)
    (folder / "tokenizer.model").write_bytes(model)
    tokens = count_tokens(model, splits["train"])
    logger.info(
        f"Built {len(texts)} documents ({len(splits['validation'])} for validation), "
        f"{sum(map(len, texts)) / 1e6:.2f}M characters, {tokens / 1e6:.2f}M training tokens "
        f"in {time.perf_counter() - start:.0f} s: {folder.parent}"
    )


def split_of(text: str) -> str:
    """The split a document belongs to: decided by its text alone, so it never changes sides."""
    return "validation" if int(_hash(text)[:8], 16) % 100 < VALIDATION_PERCENT else "train"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_lines(path: Path, texts: Iterable[str]) -> None:
    # Neither name nor time in the gzip header: the same texts give the same bytes.
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")


# ---- Reading docstrings ----------------------------------------------------------------------------------------------


@dataclass
class _Document:
    """What becomes one document: the docstrings of a class or of a module's functions, each under its heading."""

    title: str = ""  # "torch.nn.Linear", or "" where the text says itself what it is about
    parts: list[tuple[str, str]] = field(default_factory=list)  # (heading or "", docstring)

    def text(self, *, seen: set[str]) -> str:
        """Its parts that are English and not yet `seen`, or "" where they are too short; adds them to `seen`."""
        paragraphs = [self.title]
        for heading, doc in self.parts:
            if doc not in seen and _is_english(doc):
                seen.add(doc)
                paragraphs += [heading, doc]
        text = "\n\n".join(filter(None, paragraphs))
        text = text.encode("utf-8", "replace").decode("utf-8")  # "\ud800" in a docstring is half a character
        return text if len(text) >= MIN_DOCUMENT else ""


def documents(roots: Mapping[str, Path]) -> list[str]:
    """The documents in the sources under `roots`, by module prefix: every docstring once, in the order of their hashes.

    That order is a shuffle which is the same on every machine. Files that do not parse are skipped.
    """
    seen: set[str] = set()
    texts: set[str] = set()
    files = [(path, _module_name(path, root=root, prefix=prefix)) for prefix, root in roots.items()
             for path in _source_files(root)]  # fmt: skip
    with LongWait("reading source files", total=len(files)) as progress:
        for path, module in files:
            texts.update(document.text(seen=seen) for document in _documents_of_file(path, module))
            progress.advance()
    return sorted(texts - {""}, key=_hash)


def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        found += [Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("test_")]
    return sorted(found)


def _module_name(path: Path, *, root: Path, prefix: str) -> str:
    parts = [prefix, *path.relative_to(root).with_suffix("").parts]
    return ".".join(part for part in parts if part and part != "__init__")


def _documents_of_file(path: Path, module: str) -> list[_Document]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
        found = [_Document(module)]
        _collect(tree, "", document=found[0], found=found)
        return found
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []


def _collect(node: ast.AST, heading: str, *, document: _Document, found: list[_Document]) -> None:
    """Walks the statements of a module, class or function: a class opens a document, functions add to theirs."""
    if isinstance(node, SCOPES):
        document.parts.append((heading, (ast.get_docstring(node) or "").rstrip()))
    elif isinstance(node, (ast.Expr, ast.Assign)):
        attached = _attached_docs(node.value, module=found[0].title)
        found.extend(_Document(parts=[("", inspect.cleandoc(text).rstrip())]) for text in attached)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            found.append(_Document(f"{document.title}.{child.name}"))
            _collect(child, "", document=found[-1], found=found)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _collect(child, child.name, document=document, found=found)
        elif isinstance(child, (ast.stmt, ast.excepthandler)):
            _collect(child, heading, document=document, found=found)


def _attached_docs(value: ast.expr, *, module: str) -> Iterator[str]:
    """Documentation outside docstrings: add_docstr(function, text) calls, and the language reference of pydoc."""
    if isinstance(value, ast.Call):
        name = getattr(value.func, "attr", getattr(value.func, "id", ""))
        if name in ADDERS and value.args:
            yield _string(value.args[-1])
    elif isinstance(value, ast.Dict) and module == "pydoc_data.topics":
        yield from map(_string, value.values)


def _string(node: ast.expr) -> str:
    """The text of a string expression: a constant, a sum of such, or text.format(...) without its placeholders."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _string(node.left) + _string(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        template = re.sub(r"^ *\{\w+\} *\n|\{\w+\}", "", _string(node.func.value), flags=re.MULTILINE)
        return template.replace("{{", "{").replace("}}", "}")
    return ""


def _is_english(doc: str) -> bool:
    """Prose rather than bare doctests, and ASCII but for the odd sign."""
    return not doc.startswith(">>>") and sum(map(str.isascii, doc)) >= 0.98 * len(doc) > 0
