"""The files beside the code: what pyproject.toml, the pinned versions and the workflows promise agrees."""

import re
import sys

import pytest
import yaml
from support.runs import ROOT

import qgalore

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(path: str) -> dict[str, str]:
    """The versions in a file of requirements."""
    lines = (ROOT / path).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def least(requirements: list[str]) -> dict[str, str]:
    """The oldest version of each requirement."""
    return dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", each).groups() for each in requirements)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


PROMISED = least([*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["hf"], *EXTRAS["tensorboard"]])


def test_the_oldest_versions_are_those_that_are_promised():
    oldest = pins("tests/requirements-oldest.txt")
    for name, version in PROMISED.items():
        assert numbers(oldest[name])[: len(numbers(version))] == numbers(version), name


def test_what_is_pinned_keeps_the_promises_and_has_every_package():
    pinned = pins("requirements.txt") | pins("tests/requirements.txt")
    assert PROMISED.keys() <= pinned.keys()
    assert all(numbers(pinned[name]) >= numbers(version) for name, version in PROMISED.items())
    tools = {name: version for name, version in pins("tests/requirements.txt").items() if name.startswith("pytest")}
    assert tools.items() <= pins("tests/requirements-oldest.txt").items(), "the same tools"


def test_the_old_names_of_extras_mean_the_new_ones():
    assert EXTRAS["pretrain"] == ["qgalore[train]"] and EXTRAS["trainer"] == ["qgalore[hf]"]


def test_the_version_stands_in_one_place_and_is_cited():
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == qgalore.__version__ and citation["license"] == PROJECT["license"]


def test_workflow_and_hooks_run_what_is_there():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    jobs = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {"python": PROJECT["requires-python"].removeprefix(">="), "script": "scripts/test_oldest.sh"} in jobs
    assert all((ROOT / job["script"]).exists() for job in jobs)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = " ".join(hook["entry"] for hook in hooks)
    for tool in ("ruff check", "ruff format", "mypy"):
        assert tool in checks and tool in (ROOT / ".ci" / "run").read_text()
