"""The metrics of GLUE beside scikit-learn's and scipy's."""

import pytest
import torch

from peft_pretraining.glue.metrics import METRICS, score

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

THEIRS = {
    "accuracy": lambda x, y: sklearn.accuracy_score(y, x),
    "f1": lambda x, y: sklearn.f1_score(y, x),
    "matthews_correlation": lambda x, y: sklearn.matthews_corrcoef(y, x),
    "pearson": lambda x, y: stats.pearsonr(x, y)[0],
    "spearmanr": lambda x, y: stats.spearmanr(x, y)[0],
}


def test_each_has_its_twin():
    assert THEIRS.keys() == METRICS.keys()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("count", [5, 400])
def test_it_is_theirs(name, classes, count):
    if name == "f1" and classes > 2:
        pytest.skip("of two classes")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randint(classes, (2, count), generator=generator)
        if name in ("pearson", "spearmanr"):  # values, among them equal ones
            x, y = x + (torch.rand(count, generator=generator) * 4).round() / 4, y.float()
            if len(set(x.tolist())) == 1 or len(set(y.tolist())) == 1:
                continue
        assert METRICS[name](x, y) == pytest.approx(
            float(THEIRS[name](*(each.numpy() for each in (x.double(), y.double())))), abs=1e-10
        )


def test_one_class_alone_is_no_correlation():
    ones = torch.ones(6, dtype=torch.int64)
    assert METRICS["matthews_correlation"](ones, ones) == 0 == METRICS["pearson"](ones.float(), ones.float())
    assert METRICS["f1"](ones * 0, ones * 0) == 0


def test_the_score_is_their_mean():
    x, y = torch.tensor([1, 0, 1, 1]), torch.tensor([1, 0, 0, 1])
    assert score(("accuracy", "f1"), x, y) == {"accuracy": 0.75, "f1": 0.8, "score": pytest.approx(0.775)}
