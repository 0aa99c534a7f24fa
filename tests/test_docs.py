"""README.md and docs/: what they say of the program is so."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from support.models import Model, batches, loss_of
from support.runs import ROOT
from support.source_code import imports, sources

import qgalore
from qgalore.factory import OPTIMIZERS

PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "README.md", ROOT / "CHANGELOG.md"]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
README = (ROOT / "README.md").read_text()
CHOICES = (ROOT / "docs" / "optimizers.md").read_text()


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
    counts = re.search(r"it is (\d+) functions in (\d+) files", ARCHITECTURE)
    assert [int(count) for count in counts.groups()] == [len(told), len({path for path, _ in told})]
    if not driven:
        told[:2] = [("qgalore/optimizer.py", "LowRankOptimizer.step")]
        walk = walk[walk.index(told[0]) :]
    assert walk == told


# README.md


def test_the_first_screen_is_what_the_results_say(tmp_path, capsys):
    """The table is printed, and the pictures are drawn, from the files of results as they are."""
    readme_figures = importlib.import_module("benchmarks.readme_figures")
    assert readme_figures.main(["--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out in README
    peaks = [min(line["peak"] for line in readme_figures.peaks(row)) for row in readme_figures.ROWS]
    for theme in ("light", "dark"):
        drawn, kept = ((folder / f"methods-{theme}.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
        words = [re.findall(r">([^<>]+)</text>", svg) for svg in (drawn, kept)]
        assert words[0] == words[1] and {f"{peak / 1e9:.1f}" for peak in peaks} <= set(words[1])
        assert f"docs/methods-{theme}.svg" in README


def test_the_plans_of_the_first_screen_are_those_of_today():
    """Of the row that needs least, which is the quickest to plan too; the others come from the same command."""
    readme_figures = importlib.import_module("benchmarks.readme_figures")
    (row,) = (row for row in readme_figures.ROWS if row.title == "Q-GaLore")
    (kept,) = (line for line in readme_figures.peaks(row) if line["per_layer"])
    assert readme_figures.plan_of(row, per_layer=True).peak.bytes == pytest.approx(kept["peak"], rel=1e-3)


def test_the_readme_is_short():
    assert len(README.splitlines()) < 210


# docs/optimizers.md


def test_the_page_names_every_optimizer():
    assert OPTIMIZERS.keys() <= set(re.findall(r"`(\w+)`", CHOICES))


def test_the_memory_table_is_what_the_benchmark_prints(monkeypatch, capsys):
    """GB of weights, bases, moments, gradients and in total; and the sums that per-layer updates keep."""
    monkeypatch.syspath_prepend(ROOT)
    state_bytes = importlib.import_module("benchmarks.state_bytes")
    config = str(ROOT / "configs" / "llama_7b.json")
    assert state_bytes.main(["--model_config", config]) == 0
    printed = capsys.readouterr().out.splitlines()[2:]
    table = CHOICES.partition("| | weights | bases |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == len(printed) == 1 + len(state_bytes.RUNS)
    for row, line in zip(table, printed, strict=True):
        title, *cells = (cell.strip(" *`") for cell in row.strip("|").split("|"))
        assert line.split() == [*title.replace("`", "").split(), *(cell or "0.0" for cell in cells)]
    optimizer, weight_bits, proj_bits = list(state_bytes.RUNS.values())[-1]
    _, sums = state_bytes.count(config, optimizer=optimizer, weight_bits=weight_bits, proj_bits=proj_bits, rank=1024)
    assert f"keep sums at rank size, {sums / 1e9:.1f} GB" in " ".join(CHOICES.split())
    assert state_bytes.main(["--model_config", "configs/none.json"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


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
