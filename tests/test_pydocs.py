"""The embedded corpus, built from a small made-up source tree; the real one is built under -m slow."""

import functools
import gzip
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sentencepiece
from support.runs import ROOT

from peft_pretraining.data import pydocs
from peft_pretraining.errors import UserError

VOCAB_SIZE = 350  # what so small a corpus can fill: 256 bytes, the letters, a few dozen merges


def prose(topic: str) -> str:
    """A docstring of some 300 characters that is unlike the others."""
    return (
        f"Return the {topic} of its arguments.\n\nThe {topic} is computed slowly. " + f"See also {topic} theory. " * 9
    )


SHAPES = f'''
"""Shapes of all kinds, and what can be asked of them."""

open("imported", "w")  # a side effect: this module must be read, never run

class Circle:
    """{prose("circle")}"""

    def area(self):
        """{prose("area")}"""

    class Arc:
        """{prose("arc")} From \\ud800 on."""

try:
    async def measure():
        """{prose("measure")}"""
        def inner():
            """Explain the part inside."""
except ImportError:
    pass

def example():
    """>>> example()
    {"1 2 3 4 " * 50}"""

def greek():
    """{"αβγδε ζηθικ " * 30}"""
'''

C_FUNCTIONS = rf'''
add_docstr(lib.sine, r"""
sine(x) -> Tensor

{prose("sine")}

Args:
    {{input}}
    x (Tensor): the angle, in a set such as {{{{0, 1}}}}{{unit}}
""".format(**common_args))
cosine = _add_docstr(lib.cosine, "cosine(x) -> Tensor\n\n" + """{prose("cosine")}""")
print("""{prose("print")}""")
'''


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "tree")


def write_tree(root: Path, *, backwards: bool = False) -> Path:
    copy = f'class Copy:\n    """{prose("circle")}"""\n'
    topics = f'topics = {{"lambda": """{prose("lambda")}"""}}\n'
    many = "".join(f'class Topic{i}:\n    """{prose(f"topic {i}")}"""\n' for i in range(60))
    files = {
        "shapes/__init__.py": SHAPES.encode(),
        "shapes/c.py": C_FUNCTIONS.encode(),
        "shapes/copy.py": copy.encode(),
        "shapes/many.py": many.encode(),
        "shapes/test_shapes.py": copy.replace("circle", "test file").encode(),
        "shapes/tests/helper.py": copy.replace("circle", "test folder").encode(),
        "site-packages/other.py": copy.replace("circle", "other package").encode(),
        "pydoc_data/topics.py": topics.encode(),
        "broken/syntax.py": b'"""Broken."""\ndef f(:\n',
        "broken/null.py": b'"""Broken."""\x00',
        "broken/latin.py": b'"""Broken \xe9\xff"""',
        "broken/escape.py": b'x = "\\d"',
    }
    for name in sorted(files, reverse=backwards):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
    return root


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in gzip.open(path, "rt", encoding="utf-8")]


def test_a_class_or_the_functions_of_a_module_make_a_document(tree: Path) -> None:
    texts = pydocs.documents({"pack": tree})
    by_title = {text.split("\n")[0]: text for text in texts}

    assert by_title["pack.shapes.Circle"] == "\n\n".join(
        ["pack.shapes.Circle", prose("circle").strip(), "area", prose("area").strip()]
    )
    assert by_title["pack.shapes.Circle.Arc"].endswith(f"{prose('arc')} From ? on.")
    module = by_title["pack.shapes"]
    assert module.startswith("pack.shapes\n\nShapes of all kinds")
    assert "measure\n\nReturn the measure" in module and "inner\n\nExplain the part inside." in module


def test_nothing_is_imported(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    pydocs.documents({"": tree})
    assert not (tmp_path / "imported").exists()
    assert set(sys.modules) == before


def test_finding_the_packages_does_not_import_them() -> None:
    code = "import sys; from peft_pretraining.data import pydocs; print(*pydocs.source_roots()); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    roots, modules = run.stdout.splitlines()
    assert "torch" in roots.split()
    assert not {"torch", "numpy"} & set(modules.split())


def test_only_english_prose_of_the_package_itself(tree: Path) -> None:
    corpus = "\n".join(pydocs.documents({"": tree}))
    for unwanted in (">>> example", "αβγδε", "test file", "test folder", "other package", "Broken", "print theory"):
        assert unwanted not in corpus


def test_docs_attached_by_calls_are_found(tree: Path) -> None:
    """torch documents its C functions with add_docstr(function, text.format(...)), thousands of them."""
    texts = pydocs.documents({"": tree})
    (sine,) = (text for text in texts if text.startswith("sine(x) -> Tensor"))
    assert sine.endswith("Args:\n    x (Tensor): the angle, in a set such as {0, 1}")
    assert "cosine(x) -> Tensor\n\n" + prose("cosine").strip() in texts
    assert prose("lambda").strip() in texts  # pydoc's topics


def test_a_docstring_is_kept_once(tree: Path) -> None:
    corpus = "\n".join(pydocs.documents({"": tree, "again": tree}))
    assert corpus.count("Return the circle of its arguments.") == 1
    assert corpus.count("Return the sine of its arguments.") == 1


def test_the_split_depends_on_the_text_alone() -> None:
    texts = [f"document {i}" for i in range(10_000)]
    validation = [text for text in texts if pydocs.split_of(text) == "validation"]
    assert 0.035 < len(validation) / len(texts) < 0.045
    assert validation[0] == "document 10"  # golden: another rule would mix the splits of runs that are under way


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    folders = []
    for backwards in (False, True):
        root = write_tree(tmp_path / f"tree {backwards}", backwards=backwards)
        folder = tmp_path / "cache" / str(backwards)
        folders.append(pydocs.ensure_built(folder, roots={"pack": root}, vocab_size=VOCAB_SIZE))
    for name in ("train.jsonl.gz", "validation.jsonl.gz", "tokenizer.model"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    train, validation = (read(folders[0] / f"{split}.jsonl.gz") for split in pydocs.SPLITS)
    assert sorted(train + validation) == sorted(pydocs.documents({"pack": root}))
    assert validation and not set(train) & set(validation)


def test_the_tokenizer_gives_back_every_text(tree: Path, tmp_path: Path) -> None:
    folder = pydocs.ensure_built(tmp_path / "corpus", roots={"": tree}, vocab_size=VOCAB_SIZE)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert processor.vocab_size() == VOCAB_SIZE
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id()) == (0, 1, 2, -1)
    for text in [*read(folder / "train.jsonl.gz"), "  def f():\n\n        return  1\t# ünknown 漢\n", " ", "</s><unk>"]:
        ids = processor.encode(text)
        assert processor.decode(ids) == text
        assert not {0, 1, 2} & set(ids)


def test_builders_that_race_get_one_whole_corpus(tree: Path, tmp_path: Path) -> None:
    """torchrun starts every rank at once, and all of them ask for the corpus first."""
    folder = tmp_path / "cache" / "corpus"
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        arguments = {"roots": {"": tree}, "vocab_size": VOCAB_SIZE}
        results = [pool.apply_async(pydocs.ensure_built, [folder], arguments) for _ in range(4)]
        assert {result.get(timeout=60) for result in results} == {folder}
    assert {path.name for path in folder.parent.iterdir()} <= {"corpus", "corpus.lock"}
    assert len(list(folder.iterdir())) == 3


def test_where_the_lock_does_not_hold_the_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "corpus"

    def build_while_another_finishes(partial: Path, **_: object) -> None:
        (partial / "train.jsonl.gz").write_text("ours")
        folder.mkdir()
        (folder / "train.jsonl.gz").write_text("theirs")

    monkeypatch.setattr(pydocs, "_build", build_while_another_finishes)
    assert pydocs.ensure_built(folder, roots={}) == folder
    assert (folder / "train.jsonl.gz").read_text() == "theirs"
    assert {path.name for path in folder.parent.iterdir()} <= {"corpus", "corpus.lock"}


def test_a_build_that_fails_leaves_nothing(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache" / "corpus"

    def die(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(pydocs, "train_tokenizer", die)
    with pytest.raises(KeyboardInterrupt):
        pydocs.ensure_built(folder, roots={"": tree})
    assert {path.name for path in folder.parent.iterdir()} <= {"corpus.lock"}


def test_no_sources_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no docstrings"):
        pydocs.ensure_built(tmp_path / "corpus", roots={"": tmp_path / "nothing"})


@pytest.fixture
def small(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The public functions on the small tree, with a cache folder in tmp_path, which is returned."""
    cache = tmp_path / "home"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(pydocs, "source_roots", lambda: {"": tree})
    monkeypatch.setattr(pydocs, "ensure_built", functools.partial(pydocs.ensure_built, vocab_size=VOCAB_SIZE))
    return cache


def test_the_cache_is_built_once(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (train,) = pydocs.pydocs_files("train")
    assert train.parent.parent == small / "qgalore" and train.parent.name.startswith("pydocs-")
    monkeypatch.setattr(pydocs, "_build", None)  # a second build would fail
    (validation,) = pydocs.pydocs_files("validation")
    assert pydocs.pydocs_tokenizer_model().parent == validation.parent == train.parent
    assert read(train) and read(validation)


def test_an_unwritable_cache_folder_gives_way_to_a_temporary_one(small: Path, tmp_path: Path) -> None:
    small.write_text("a file where the cache folder should be")
    (tmp_path / "temp").mkdir()
    assert tmp_path / "temp" in pydocs.pydocs_tokenizer_model().parents


def test_no_writable_folder_is_a_user_error(small: Path, tmp_path: Path) -> None:
    small.write_text("a file where the cache folder should be")
    (tmp_path / "temp").write_text("a file here, too")
    with pytest.raises(UserError, match="Set XDG_CACHE_HOME"):
        pydocs.pydocs_files("train")


def test_other_versions_are_another_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = {"": Path("/python"), "torch": Path("/torch")}
    before = pydocs._fingerprint(roots)
    assert before == pydocs._fingerprint({"": Path("/elsewhere"), "torch": Path("/elsewhere")})
    monkeypatch.setattr(pydocs, "_version", lambda package: "0.0.0")
    assert before != pydocs._fingerprint(roots)


@pytest.mark.slow
def test_the_real_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (train,), (validation,) = (pydocs.pydocs_files(split) for split in pydocs.SPLITS)
    processor = sentencepiece.SentencePieceProcessor(model_file=os.fspath(pydocs.pydocs_tokenizer_model()))
    texts, held_out = read(train), read(validation)
    tokens = sum(map(len, processor.encode(texts)))
    assert processor.vocab_size() == pydocs.VOCAB_SIZE
    assert 2e6 < tokens < 8e6
    assert 0.02 < len(held_out) / len(texts) < 0.06
    assert sum(map(len, texts)) / tokens > 2.8  # characters per token
    assert any(text.startswith("matmul(input, other") for text in texts + held_out)
