"""README.md and docs/: what they say of the program is so."""

import re
import sys
from pathlib import Path

import pytest
import torch
from support.models import Model, batches, loss_of
from support.runs import ROOT
from support.source_code import imports, sources

import qgalore
from peft_pretraining.model.build import build_model, meta_model
from peft_pretraining.model.config import read_config
from qgalore.factory import OPTIMIZERS
from qgalore.storage.convert import quantize_module_weight

PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "CHANGELOG.md"]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()


def pictures() -> list[str]:
    """The blocks of text in docs/architecture.md."""
    return re.findall(r"^```text\n(.*?)^```$", ARCHITECTURE, re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:qgalore|peft_pretraining|docs|tests|benchmarks|scripts|configs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


# docs/architecture.md


def test_the_picture_names_all_there_is_and_imports_point_down():
    """Each line of the house may import those below it, and nothing beside or above it."""
    places: dict[str, int] = {}
    package = ""
    for number, line in enumerate(pictures()[0].splitlines()):
        if top := re.match(r"(\w+)(/|\.py)", line):
            package = top[1]
            places[package] = number
        elif line.strip():
            for name in re.match(r"  ((?:\w+/?  )+)", line)[1].split():
                places[f"{package}.{name.rstrip('/')}"] = number
    found = {part_of(module) for name in ("qgalore", "peft_pretraining") for module in sources(ROOT, name)}
    old_names = {"peft_pretraining.hf_export"}  # stays where it was for those who call it
    assert found - old_names == places.keys() - {"torchrun_main"}
    for module, path in (sources(ROOT, "qgalore") | sources(ROOT, "peft_pretraining")).items():
        below = [part_of(each.name) for each in imports(path) if each.package in ("qgalore", "peft_pretraining")]
        here = part_of(module)
        if here in places and "." in here:
            assert all(places[other] > places[here] for other in below if other != here), module


def part_of(module: str) -> str:
    """The line of the picture that a module or a name in it is on."""
    return ".".join(module.split(".")[:2])


def test_the_walks_name_what_is_there():
    for walk in pictures()[1:]:
        for path, name in re.findall(r"^(\S+\.py) +([\w.]+)  ", walk, re.M):
            file = next(f for f in (ROOT / path, ROOT / "peft_pretraining" / path) if f.exists())
            for part in name.split("."):
                assert re.search(rf"^ *(class|def) {part}\b", file.read_text(), re.M), f"{path} {name}"


def walk_of_a_gradient(updates, forward) -> list[tuple[str, str]]:
    """The functions of qgalore that are running when the codes of the first matrix are written, outermost first."""
    walks = []

    def called(frame, event, argument):
        if event == "call" and frame.f_code.co_name == "encode_" and frame.f_code.co_filename.endswith("affine.py"):
            walk = []
            while frame is not None:
                path = Path(frame.f_code.co_filename)
                if path.is_relative_to(ROOT / "qgalore"):
                    owner = frame.f_locals.get("self")
                    walk.append((str(path.relative_to(ROOT)), owner, frame.f_code.co_name))
                frame = frame.f_back
            walks.append([(path, name_of(owner, name)) for path, owner, name in reversed(walk)])

    forward().backward()
    updates.finish()  # every basis is due at the first update
    sys.setprofile(called)
    forward().backward()
    updates.finish()
    sys.setprofile(None)
    return walks[0]


def name_of(owner: object, name: str) -> str:
    return next((f"{kind.__name__}.{name}" for kind in type(owner).__mro__ if name in vars(kind)), name)


@pytest.mark.parametrize("driven", ["_per_layer", ""])
def test_a_gradient_takes_the_road_of_the_page(driven):
    model, (batch,) = Model(width=96), batches(1)
    qgalore.quantize_linear_layers(model, select=lambda name: "mlp" in name, seed=0)
    settings = qgalore.Settings(lr=0.01, rank=8, proj_bits=4, update_proj_gap=50)
    name = f"q_galore_adamw8bit{driven}"
    optimizer = qgalore.create_optimizer(name, groups=qgalore.split_parameters(model), settings=settings)
    updates = qgalore.create_updates(name, optimizer=optimizer, sync=qgalore.GradSync())
    walk = walk_of_a_gradient(updates, lambda: loss_of(model, batch))
    told = re.findall(r"^(\S+) +([\w.]+)  ", pictures()[1], re.M)
    if not driven:
        told[0] = ("qgalore/optimizer.py", "LowRankOptimizer.step")
        walk = walk[walk.index(told[0]) :]
    assert walk == told
    counts = re.search(r"it is (\d+) functions in (\d+) files", ARCHITECTURE)
    assert [int(count) for count in counts.groups()] == [len(told), len({path for path, _ in told})]


# README.md


def test_the_readme_names_every_optimizer():
    assert OPTIMIZERS.keys() <= set(re.findall(r"`(\w+)`", README))


MEMORY = {  # row: optimizer, bits of weights and of bases
    "`galore_adamw8bit`": ("galore_adamw8bit", None, None),
    "`galore_adamw8bit_per_layer`": ("galore_adamw8bit_per_layer", None, None),
    "`q_galore_adamw8bit_per_layer`, INT8 weights, INT4 bases": ("q_galore_adamw8bit_per_layer", 8, 4),
    "the same with 4-bit weights": ("q_galore_adamw8bit_per_layer", 4, 4),
}


def memory_of_a_7b(name: str, weight_bits: int | None, proj_bits: int | None) -> tuple[list[float], float]:
    """GB of weights, bases, moments and gradients at the peak of an update, and of sums over micro-batches."""
    config = read_config(ROOT / "configs" / "llama_7b.json")
    groups = qgalore.split_parameters(meta_model(config))
    matrices = {name for group in groups if group.kind == "matrix" for name in group.names}

    def finish(name, module):
        if weight_bits and f"{name}.weight" in matrices:
            quantize_module_weight(module, bits=weight_bits)

    model = build_model(config, device="meta", dtype=torch.bfloat16, seed=0, finish=finish)
    settings = qgalore.Settings(rank=1024, proj_bits=proj_bits)
    optimizer = qgalore.create_optimizer(name, groups=qgalore.split_parameters(model), settings=settings)
    optimizer.allocate()
    kept = qgalore.kept_bytes(model, optimizer)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    gradients = max(sizes) if OPTIMIZERS[name].per_layer else sum(sizes)
    shapes = [p.shape if update.always_whole else update.projector.projected_shape
              for p, update in optimizer.updates.items()]  # fmt: skip
    sums = sum(2 * shape.numel() for shape in shapes)
    found = [kept["weights"] + kept["scales"], kept["bases"], kept["moments"], gradients]
    return [size / 1e9 for size in found], sums / 1e9


def memory_row(title: str) -> list[float]:
    """The figures of a row; 0 where nothing is kept."""
    (row,) = re.findall(rf"^\| {re.escape(title)} \|([ \d.*|]+)\|$", README, re.M)
    return [float(cell.strip("* ") or 0) for cell in row.split("|")]


@pytest.mark.parametrize("title", MEMORY)
def test_the_memory_table_counts_right(title):
    counted, sums = memory_of_a_7b(*MEMORY[title])
    assert memory_row(title) == pytest.approx([*counted, sum(counted)], abs=0.0501)
    if "per_layer" in title:
        (said,) = re.findall(r"keep sums at rank size, ([\d.]+) GB", README)
        assert float(said) == pytest.approx(sums, abs=0.05)


def test_the_memory_of_adamw_counts_right():
    elements = sum(p.numel() for p in meta_model(read_config(ROOT / "configs" / "llama_7b.json")).parameters())
    once = 2 * elements / 1e9
    assert memory_row("AdamW, all in bfloat16") == pytest.approx([once, 0, 2 * once, once, 4 * once], abs=0.0501)


def test_the_memory_of_gradients_inside_backward_is_that_of_one():
    model, most = Model(width=32), 0

    def made(p):
        nonlocal most
        most = max(most, sum(q.grad is not None for q in model.parameters()))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(made)
    name = "galore_adamw_per_layer"
    optimizer = qgalore.create_optimizer(
        name, groups=qgalore.split_parameters(model), settings=qgalore.Settings(rank=4)
    )
    updates = qgalore.create_updates(name, optimizer=optimizer, sync=qgalore.GradSync())
    loss_of(model, batches(1)[0]).backward()
    updates.finish()
    assert most == 1
