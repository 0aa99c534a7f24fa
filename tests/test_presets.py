"""Presets: data files that a run can begin from, the published figures among them."""

import json
import re

import pytest
from compare import METHODS, RECOMMENDED
from support.command_line import flags_refusal
from support.runs import ROOT

from benchmarks import arena
from peft_pretraining.cli.args import parse_args
from peft_pretraining.cli.flags import defaults
from peft_pretraining.cli.presets import FOLDER, load_preset, preset_names

PERPLEXITY = {  # Zhang et al. 2024, table 1, on C4
    "galore": {"60m": 34.88, "130m": 25.36, "350m": 18.95, "1b": 15.64, "7b": None},
    "q_galore": {"60m": 34.88, "130m": 25.53, "350m": 19.79, "1b": 16.25, "7b": None},
    "osd": {"60m": None, "7b": None},
} | {kind: dict.fromkeys(("9m", "20m", "60m", "130m", "350m", "1b", "7b")) for kind in ("recommended", "lean", "fast")}


def test_every_recipe_is_there():
    assert set(preset_names()) == {f"{method}_{size}" for method, sizes in PERPLEXITY.items() for size in sizes}
    for method, sizes in PERPLEXITY.items():
        assert {size: load_preset(f"{method}_{size}").perplexity for size in sizes} == sizes


def settings_of(flags) -> dict:
    """What the flags of a row of arena.py, or of compare.py, set; the optimizer is the first of them."""
    args = parse_args(["--optimizer", *flags, "--model_config", "x.json", "--batch_size", "1"])
    return {name: getattr(args, name) for name in ("optimizer", *(f[2:] for f in flags if f.startswith("--")))}


@pytest.mark.parametrize("size", PERPLEXITY["recommended"])
def test_what_is_recommended_is_what_was_measured(size):
    """The settings of a row of arena.py, or of compare.py; but at 7B whole gradients would take 13 GB."""
    args = parse_args(["--preset", f"recommended_{size}"])
    row = arena.METHODS[arena.RECOMMENDED]
    if size == "9m":
        optimizer, flags, _ = METHODS[RECOMMENDED]
        expected = settings_of([optimizer, *flags])
    else:
        expected = settings_of(row.flags) | {"embedding_weight_bits": None if size == "7b" else 8}
    if size == "20m":
        assert (args.lr * args.matrix_lr_ratio, args.beta2) == (row.matrix_lr, row.beta2[0])
    if size == "7b":
        expected |= {"optimizer": f"{expected['optimizer']}_per_layer", "residual": "none", "subspace": "iterate"}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (load_preset(f"recommended_{size}").measured is not None) == (size in ("9m", "20m"))


@pytest.mark.parametrize("size", PERPLEXITY["recommended"])
@pytest.mark.parametrize("kind, row", [("lean", "Q-GaLore, lean"), ("fast", "Q-GaLore")])
def test_variants_are_rows_of_the_arena_too(kind, row, size):
    """At the rates of what is recommended, whose training they share."""
    recommended, args = (parse_args(["--preset", f"{name}_{size}"]) for name in ("recommended", kind))
    expected = settings_of(arena.METHODS[row].flags)
    assert {name: getattr(args, name) for name in expected} == expected
    same = ("model_config", "lr", "matrix_lr_ratio", "galore_scale", "beta2", "rank", "num_training_steps")
    assert all(getattr(args, name) == getattr(recommended, name) for name in same)
    assert args.compile == (kind == "fast")


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_a_run_that_can_be_meant(name):
    args = parse_args(["--preset", name])
    preset = load_preset(name)
    assert {flag: getattr(args, flag) for flag in preset.flags} == preset.flags
    size = name.split("_")[-1]
    assert args.model_config == f"configs/llama_{size}.json"
    assert args.total_batch_size == (8 if size in ("9m", "20m") else 512)
    assert args.warmup_steps == args.num_training_steps // 10
    assert not args.ignored, "it sets nothing that has no effect"
    assert {type(preset.flags[flag]) for flag in preset.flags if defaults()[flag] is False} <= {bool}
    own = name.startswith(("recommended", "lean", "fast"))
    assert preset.source == "docs/results.md" if own else "arXiv" in preset.source


def test_the_command_line_wins():
    args = parse_args(["--preset", "q_galore_60m", "--lr", "0.5", "--batch_size", "4", "--rank", "7"])
    assert (args.lr, args.batch_size, args.rank) == (0.5, 4, 7)
    assert args.weight_quant and args.optimizer == "q_galore_adamw8bit" and args.gradient_accumulation == 128


def test_a_preset_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_args(["--preset", "galore_60m"]).model_config == str(ROOT / "configs" / "llama_60m.json")


def test_a_preset_may_extend_another(tmp_path, monkeypatch):
    """Its flags win; all others are those of the other."""
    described = {"about": "a run", "source": "docs/results.md", "perplexity": None}
    (tmp_path / "base.json").write_text(json.dumps(described | {"flags": {"lr": 0.5, "rank": 7}}))
    (tmp_path / "own.json").write_text(json.dumps(described | {"extends": "base", "flags": {"rank": 8}}))
    monkeypatch.setattr("peft_pretraining.cli.presets.FOLDER", tmp_path)
    assert load_preset("own").flags == {"lr": 0.5, "rank": 8} and load_preset("base").flags == {"lr": 0.5, "rank": 7}


def test_an_unknown_preset_lists_the_known_ones():
    message = flags_refusal("--preset", "galore_60")
    assert message.startswith("unknown --preset 'galore_60'. Did you mean galore_60m? Known: fast_130m, ")


def test_a_preset_with_an_unknown_flag_is_refused(tmp_path, monkeypatch):
    content = json.loads((FOLDER / "galore_60m.json").read_text())
    content["flags"]["rnak"] = 4
    (tmp_path / "own.json").write_text(json.dumps(content))
    monkeypatch.setattr("peft_pretraining.cli.presets.FOLDER", tmp_path)
    assert "own.json: there is no flag --rnak" in flags_refusal("--preset", "own")


def test_the_page_lists_every_preset_with_its_figure():
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| ([\d.]+|-) \|$", (ROOT / "docs" / "presets.md").read_text(), flags=re.MULTILINE
    )
    described = [name for name in preset_names() if not name.startswith(("lean", "fast"))]
    assert {name: figure for name, figure in rows if name in described} == {
        name: "-" if load_preset(name).perplexity is None else f"{load_preset(name).perplexity:g}" for name in described
    }
