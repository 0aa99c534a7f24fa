"""docs/extending.md, block by block: what the page tells others to write is run, and does what the page says."""

import csv
import importlib
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from types import ModuleType
from unittest import mock

import pytest
import torch
from support.gradients import largest_difference
from support.models import Model, batches, loss_of
from support.oracles import Adam, GaLore
from support.runs import ROOT, losses, record
from transformers import AutoModelForCausalLM

import torchrun_main
from peft_pretraining.checkpoint.weights import load_weights
from peft_pretraining.data.loader import train_batches
from peft_pretraining.data.tokenizer import load_tokenizer
from peft_pretraining.export.__main__ import export
from peft_pretraining.model.build import build_model, meta_model
from peft_pretraining.model.config import read_config
from peft_pretraining.model.family import FAMILIES
from peft_pretraining.training import plan
from qgalore.factory import OPTIMIZERS, Settings, create_optimizer
from qgalore.options import GROUP_OPTIONS
from qgalore.param_groups import ParameterGroup, split_parameters
from qgalore.rules.lifts import LIFTS
from qgalore.rules.rules import RULES
from qgalore.storage.stored import CODECS, Stored, build_codec, describe_codec
from qgalore.subspace.bases import METHODS
from qgalore.subspace.projector import Projector

SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S))
LR, DECAY, SCALE, RANK, GAP, UPDATES = 0.02, 0.1, 0.25, 3, 10, 14
REFRESHES = (1, 1 + GAP)


def blocks(title: str) -> list[tuple[str, str, str]]:
    """The blocks of a section: their language, their file, their code."""
    found = re.findall(r"^```(python|diff)\n ?# (\S+)\n(.*?)^```$", SECTIONS[title], re.M | re.S)
    assert len(found) == SECTIONS[title].count("```") // 2, "every block names its file"
    return found


@pytest.fixture
def extend(monkeypatch):
    """Does what a section says. Returns the namespaces of its blocks, by file; the tables are put back in the end."""
    tables = (RULES, METHODS, LIFTS, CODECS, FAMILIES, OPTIMIZERS, GROUP_OPTIONS)

    def follow(title: str) -> dict[str, dict]:
        spaces = {path: run_block(monkeypatch, *block) for block in blocks(title) for path in [block[1]]}
        for name, table in {"rule": RULES, "subspace": METHODS, "lift": LIFTS}.items():
            known = GROUP_OPTIONS[name]  # its choices are those of the table when the module was loaded
            GROUP_OPTIONS[name] = known._replace(option=replace(known.option, choices=tuple(table)))
        return spaces

    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table))
        yield follow


def run_block(monkeypatch, language: str, path: str, code: str) -> dict:
    """The names that a block leaves: in its new file, beside those of its file, or in its file with the lines added."""
    name = path.removesuffix(".py").replace("/", ".")
    if language == "diff":
        return run_source(name, with_lines_added((ROOT / path).read_text(), code))
    if (ROOT / path).exists():
        space = dict(vars(importlib.import_module(name)))
        exec(compile(code, path, "exec", dont_inherit=True), space)
        return space
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(code, path, "exec", dont_inherit=True), vars(module))
    return vars(module)


def run_source(name: str, source: str) -> dict:
    module = ModuleType(name)
    exec(compile(source, name, "exec", dont_inherit=True), vars(module))
    return vars(module)


def with_lines_added(source: str, diff: str) -> str:
    """The source with the lines of each `+` after those above them, which must be there once."""
    hunks = re.findall(r"((?:^ .*\n)+)((?:^\+.*\n)+)", diff, re.M)
    assert "".join(above + added for above, added in hunks) == diff
    for hunk in hunks:
        there, added = (re.sub(r"^[ +]", "", lines, flags=re.M) for lines in hunk)
        assert source.count(there) == 1, f"the file has changed: {there}"
        source = source.replace(there, there + added)
    return source


@pytest.mark.parametrize("title", SECTIONS)
def test_an_extension_takes_fewer_than_40_lines(title):
    added = [
        line
        for language, _, code in blocks(title)
        for line in code.splitlines()
        if line.strip() and (language == "python" or line.startswith("+"))
    ]
    assert 0 < len(added) < 40, f"{title}: {len(added)} lines"


# Optimizers, beside float64


def gradients_of(shape: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(UPDATES)]


def train(name: str, W: torch.Tensor, gradients: list[torch.Tensor], **more):
    """W after an update from each gradient, and the optimizer."""
    p = torch.nn.Parameter(W.clone())
    settings = Settings(lr=LR, weight_decay=DECAY, scale=SCALE, rank=RANK, update_proj_gap=GAP, **more)
    optimizer = create_optimizer(name, groups=[ParameterGroup("matrix", "matrix", ("w",), (p,))], settings=settings)
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
    return p.detach(), optimizer


def galore(W: torch.Tensor, gradients: list[torch.Tensor], **more) -> torch.Tensor:
    """The same by the paper, with another rule or basis."""
    oracle = GaLore(W, rank=RANK, scale=SCALE, lr=LR, weight_decay=DECAY, refreshes=REFRESHES, **more)
    for G in gradients:
        oracle.update(G)
    return oracle.W


def loss_falls(name: str, **settings) -> bool:
    """On a model with matrices, norm, embedding and head, some of whose moments have 8 bits if they may."""
    model, (batch,) = Model(width=96), batches(1)
    optimizer = create_optimizer(
        name, groups=split_parameters(model), settings=Settings(lr=0.005, rank=8, update_proj_gap=3, **settings)
    )
    found = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found[-1] < found[0]


class Signum(Adam):
    """Bernstein et al. 2018, algorithm 2."""

    def step(self, g):
        self.m = 0.9 * self.m + 0.1 * g
        return self.m

    def finish(self, U):
        return torch.sign(U)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_rule(extend, shape):
    extend("A rule")
    W, gradients = torch.randn(shape, dtype=torch.float64), gradients_of(shape)
    ours, _ = train("galore_signum", W, gradients, subspace="svd")
    assert largest_difference([ours], [galore(W, gradients, rule=Signum)]) < 1e-10
    OPTIMIZERS["galore_signum8bit"] = replace(OPTIMIZERS["galore_signum"], state_bits=8)
    assert loss_falls("galore_signum8bit")


@pytest.mark.parametrize("wide", [True, False])
def test_a_basis(extend, wide):
    largest_rows = extend("A basis")["qgalore/subspace/bases.py"]["largest_rows"]
    W, gradients = torch.randn(12, 20, dtype=torch.float64), gradients_of((12, 20))
    chosen = [sorted(gradients[update - 1].norm(dim=1).argsort()[-RANK:].tolist()) for update in REFRESHES]
    turned = (lambda X: X) if wide else (lambda X: X.mT.contiguous())  # the side that is projected has 12 elements
    few, _ = train("row_adamw", turned(W), [turned(G) for G in gradients[:GAP]])
    rows = torch.nn.Parameter(W[chosen[0]].clone())
    adamw = torch.optim.AdamW([rows], lr=LR * SCALE, weight_decay=DECAY / SCALE)
    for G in gradients[:GAP]:
        rows.grad = G[chosen[0]]
        adamw.step()
    expected = W * (1 - LR * DECAY) ** GAP
    expected[chosen[0]] = rows.detach()
    assert largest_difference([few], [turned(expected)]) < 1e-10
    bases = [torch.eye(12, dtype=torch.float64)[:, c] for c in chosen]
    drawn = iter(bases)
    many, _ = train("row_adamw", turned(W), [turned(G) for G in gradients])
    whole = galore(turned(W), [turned(G) for G in gradients], drawn=lambda: next(drawn))
    assert largest_difference([many], [whole]) < 1e-10
    P = largest_rows(gradients[0], None, rank=RANK, share=1.0, seed=0, draw=0)
    assert torch.equal(P, bases[0]) and torch.equal(P.mT @ P, torch.eye(RANK, dtype=torch.float64))
    assert loss_falls("row_adamw")


class Limited(Adam):
    """Adam, whose updates have a root mean square of at most 0.2 in the full space."""

    met: list[bool] = []

    def finish(self, U):
        size = U.square().mean().sqrt()
        self.met.append(bool(size > 0.2 * SCALE))
        return U * min(1.0, 0.2 * SCALE / size)


def test_a_lift(extend):
    function = extend("A lift")["qgalore/rules/lifts.py"]["bring_back_limited"]
    W, gradients = torch.randn(12, 20, dtype=torch.float64), gradients_of((12, 20))
    gradients[GAP:] = [0.01 * G for G in gradients[GAP:]]
    ours, optimizer = train("galore_limited", W, gradients, subspace="svd")
    Limited.met = []
    assert largest_difference([ours], [galore(W, gradients, rule=Limited)]) < 1e-10
    assert {True, False} == set(Limited.met), "the limit is met, and sometimes not"
    D, way = torch.randn(RANK, 20), mock.Mock(back=lambda D: W[:, :RANK].float() @ D)
    (limited, phi), free = function(D, None, None, way), way.back(D)
    assert phi is None
    limited = way.back(limited)
    assert limited.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-5)
    assert torch.cosine_similarity(limited.flatten(), free.flatten(), dim=0).item() == pytest.approx(1, abs=1e-6)
    assert loss_falls("galore_limited")


# What is kept


def test_a_codec(extend, monkeypatch, tiny, tmp_path):
    spaces = extend("A codec")
    Float8 = spaces["qgalore/storage/float8.py"]["Float8"]
    values = torch.randn(64, 24) * torch.randn(64, 1).exp()
    values[3] = 0
    stored = Stored.zeros(Float8(), values.shape, device="cpu")
    assert (stored.read(torch.float32) == 0).all()
    stored.write(values)
    back = stored.read(torch.float32)
    normal = values.abs().amax(1, keepdim=True) / 448 * 2**-6  # the smallest normal number of the row
    assert ((back - values).abs() <= torch.maximum(values.abs(), normal) / 16 * (1 + 1e-6)).all()
    assert ((back - values).abs().max() > 0) and (back[3] == 0).all()
    stored.write(back)
    assert torch.allclose(stored.read(torch.float32), back, rtol=1e-6), "what is on the grid stays"
    assert build_codec(describe_codec(Float8())) == Float8()
    stored.write(values.index_fill(0, torch.tensor([5]), torch.nan))
    assert not stored.read(torch.float32)[5].isfinite().any()

    monkeypatch.setattr(Projector, "codec", spaces["qgalore/subspace/projector.py"]["Projector"].codec)
    W, gradients = torch.randn(12, 20, dtype=torch.float64), gradients_of((12, 20))
    _, optimizer = train("galore_adamw", W, gradients[:1], proj_bits=8)
    (state,) = optimizer.state.values()
    assert state["left.codes"].dtype == torch.float8_e4m3fn and state["left.scale"].shape == (12, 1)
    (update,) = optimizer.updates.values()
    P = state["left.codes"].double() * state["left.scale"].double()
    R = update.project(gradients[1])
    assert torch.allclose(R, P.mT @ gradients[1], atol=1e-5), "the projection is by the codes"
    check_resuming(tiny, tmp_path, optimizer="galore_adamw", rank=8, proj_quant=True, proj_bits=8, update_proj_gap=4)


def check_resuming(tiny, folder, **flags) -> None:
    """Six updates, of which the last three are done again from a checkpoint, to the last bit; the loss falls."""
    assert torchrun_main.command_line(tiny.flags(folder / "whole", save_every=3, **flags)) == 0
    middle = folder / "whole" / "checkpoint-00000003"
    more = tiny.flags(folder / "half", save_every=3, continue_from=middle, **flags)
    assert torchrun_main.command_line(more) == 0
    found = losses(folder / "whole")
    assert losses(folder / "half") == found[3:] and found[-1] < found[0]


# Data and figures


def test_a_data_source(extend, monkeypatch, tiny, tmp_path):
    spaces = extend("A data source")
    ListDocuments = spaces["peft_pretraining/data/listed.py"]["ListDocuments"]
    texts = [f"{number}" for number in range(37)]
    source = ListDocuments(texts, seed=0, shuffle=True)
    epochs = []
    for epoch in range(2):
        shares = [[d.text for d in source.read(epoch=epoch, readers=2) if d.reader == rank] for rank in range(2)]
        assert sorted(shares[0] + shares[1], key=int) == texts and abs(len(shares[0]) - len(shares[1])) == 1
        epochs.append(shares[0])
    assert epochs[0] != epochs[1] != sorted(epochs[1], key=int)
    assert source.fingerprint() != ListDocuments(texts[1:], seed=0, shuffle=True).fingerprint()

    source = ListDocuments(["de fi go hu ka le mi no"[:length] for length in range(3, 24)], seed=0, shuffle=True)
    tokenizer = load_tokenizer(str(tiny.tokenizer))
    how = dict(batch_size=2, max_length=8, packing="concat", workers=0)
    whole = list(islice(train_batches(source, tokenizer, **how), 40))
    assert whole[-1].epoch > 1
    rest = train_batches(source, tokenizer, resume=whole[14].position.to_json(), **how)
    for ours, theirs in zip(islice(rest, 25), whole[15:], strict=True):
        assert torch.equal(ours.input_ids, theirs.input_ids) and ours.position == theirs.position

    monkeypatch.setattr(plan, "open_documents", spaces["peft_pretraining/data/sources.py"]["open_documents"])
    check_resuming(tiny, tmp_path, dataset="fables")
    assert record(tmp_path / "whole", "eval")[-1]["tokens"] > 0


def test_a_metrics_sink(extend, monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(
        plan, "open_record", extend("A metrics sink")["peft_pretraining/training/metrics.py"]["open_record"]
    )
    for updates in (3, 6):
        flags = tiny.flags(tmp_path, num_training_steps=updates, resume="auto", allow_changed="num_training_steps")
        assert torchrun_main.command_line(flags) == 0
    with open(tmp_path / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    for line, event in zip(lines, record(tmp_path, "update"), strict=True):
        assert {name: float(value) for name, value in line.items()} == {name: event[name] for name in line}


def test_an_architecture(extend, tiny, tmp_path):
    extend("An architecture")
    shape = json.loads(tiny.config.read_text()) | {"model_type": "mistral", "architectures": None}
    path = tmp_path / "mistral_tiny.json"
    path.write_text(json.dumps(shape | {"num_key_value_heads": 1, "sliding_window": 8}))
    groups = {group.kind: len(group.names) for group in split_parameters(meta_model(read_config(path)))}
    assert groups == {"matrix": 14, "embedding": 1, "head": 1, "norm": 5}
    check_resuming(tiny, tmp_path, model_config=path, optimizer="q_galore_adamw8bit_per_layer", rank=8)
    assert export(tmp_path / "whole", tmp_path / "out", verify=True) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == "MistralForCausalLM"
    ours = build_model(read_config(path), device="cpu", dtype=torch.float32, seed=0)
    load_weights(ours, tmp_path / "whole" / "checkpoint-00000006")
    ids = torch.arange(20).view(1, 20)
    assert torch.allclose(ours.eval()(ids).logits, theirs.eval()(ids).logits, atol=1e-5)
