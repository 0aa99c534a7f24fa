"""Options are declared once: groups, flags and their errors follow from the declaration."""

import copy
import dataclasses
import pickle

import pytest
import torch

from peft_pretraining.cli.flags import FLAGS, RunOptions
from qgalore.factory import OPTIMIZERS
from qgalore.optimizer import LowRankOptimizer
from qgalore.options import GROUP_OPTIONS, ProjectionOptions, Settings, complete_group, declared
from qgalore.rules.rules import RULES


def matrix() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(12, 20))


def group_of(**options) -> dict:
    return LowRankOptimizer([{"params": [matrix()], "rank": 4, **options}]).param_groups[0]


def test_every_option_has_a_meaning_and_its_default_is_in_range():
    for holder in (RunOptions, Settings):
        for each in declared(holder):
            assert each.option.help and each.option.section, each.name
            assert each.option.problem(each.default) is None, each.name


def test_a_group_has_the_defaults_of_the_command_line():
    """One declaration each: the gap is 50 in both, as in the reference's scripts."""
    group = group_of()
    for each in declared(ProjectionOptions):
        assert group[each.name] == (4 if each.name == "rank" else FLAGS[each.flag].default)
    assert group["update_proj_gap"] == 50


@pytest.mark.parametrize(
    "key, message",
    [
        ("update_proj_gab", "Did you mean 'update_proj_gap'"),
        ("proj_typ", "Did you mean 'proj_type'"),
        ("weight_decy", "Did you mean 'weight_decay'"),
        ("colour", "Known: rank, update_proj_gap"),
    ],
)
def test_an_unknown_key_is_refused_with_the_right_one(key, message):
    with pytest.raises(ValueError, match=f"unknown option '{key}' of a parameter group") as error:
        group_of(**{key: 1})
    assert message in str(error.value) and "--" not in str(error.value)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        (dict(quant=True, quant_n_bit=4, quant_group_size=128), dict(proj_bits=4, proj_group_size=128)),
        (dict(quant=True, quant_n_bit=8), dict(proj_bits=8)),
        (dict(proj_quant=True), dict(proj_bits=4)),
        (dict(proj_quant=False), dict(proj_bits=None)),
        (dict(quant=False, quant_n_bit=4), dict(proj_bits=None)),
        (dict(cos_threshold=0.4, gamma_proj=2, queue_size=5), dict(cos_threshold=0.4, gamma_proj=2, queue_size=5)),
        (dict(scale=0.25, proj_type="reverse_std"), dict(scale=0.25, proj_type="reverse_std")),
        (dict(dim=2, correct_bias=True, saddle=False), {}),
    ],
    ids=str,
)
def test_the_reference_packages_keys_are_understood(theirs, ours):
    group = group_of(**theirs)
    assert {name: group[name] for name in ours} == ours
    assert not {"quant", "proj_quant", "quant_n_bit", "quant_group_size", "dim", "saddle"} & group.keys()


@pytest.mark.parametrize("options", [dict(dim=3), dict(saddle=True), dict(maximize=True)])
def test_what_cannot_be_had_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"'{name}' of a parameter group is not supported"):
        group_of(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(update_proj_gap=0), "update_proj_gap = 0 is out of range: it must be at least 1"),
        (dict(proj_type="middle"), "must be one of std, reverse_std"),
        (dict(proj_bits=3), "must be 4 or 8"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(rule="muon", rank=None, params=[torch.nn.Parameter(torch.randn(3))]), "may hold matrices only"),
        (dict(scale=float("inf")), "scale"),
    ],
)
def test_values_out_of_range_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        group_of(**options)


def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was():
    optimizer = LowRankOptimizer([matrix()])
    with pytest.raises(ValueError, match="unknown option"):
        optimizer.add_param_group({"params": [matrix()], "rnk": 3})
    assert len(optimizer.param_groups) == 1 and len(optimizer.updates) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_a_copy_goes_on_as_the_original(copied):
    """With a group added after construction, bases that learn and 8-bit moments; copied in the middle."""
    first, second = matrix(), torch.nn.Parameter(torch.randn(64, 64))
    optimizer = LowRankOptimizer([{"params": [first], "rank": 4, "proj_type": "continuous"}], lr=0.01, seed=3)
    optimizer.add_param_group({"params": [second], "state_bits": 8})
    generator = torch.Generator().manual_seed(1)

    def step(chosen: LowRankOptimizer) -> list[torch.Tensor]:
        for p in (p for group in chosen.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=generator)
        chosen.step()
        return [p.detach() for group in chosen.param_groups for p in group["params"]]

    step(optimizer), step(optimizer)
    twin = copied(optimizer)
    state = generator.get_state()
    ours = step(optimizer)
    generator.set_state(state)
    assert all(torch.equal(p, q) for p, q in zip(ours, step(twin), strict=True))


def test_recipes_set_options_that_exist():
    for name, recipe in OPTIMIZERS.items():
        for kind in ("matrix", "embedding", "head", "norm"):
            assert getattr(recipe, kind).keys() <= GROUP_OPTIONS.keys(), (name, kind)


def test_settings_are_named_as_groups_are():
    names = {field.name for field in dataclasses.fields(Settings)}
    assert {each.name for each in declared(ProjectionOptions)} <= names
    assert complete_group({"params": [matrix()], **dataclasses.asdict(ProjectionOptions(rank=3))})["rank"] == 3


def test_a_rule_from_outside_is_a_choice(monkeypatch):
    """The tables are looked into when a group is checked, not copied when the module is imported."""
    monkeypatch.setitem(RULES, "mine", RULES["sgd"])
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = LowRankOptimizer([{"params": [p], "rule": "mine"}], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -0.5))
