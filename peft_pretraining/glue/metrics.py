"""GLUE's metrics, in float64. Each has the definition of scikit-learn's or scipy's function, which the tests compare.

Predictions and references are tensors of one length: class numbers (int64), or values (floating) of a regression. Where
a metric is not defined, because all values are the same, say, it is 0.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def accuracy(predictions: Tensor, references: Tensor) -> float:
    """The share of predictions that are right."""
    return float((predictions == references).double().mean())


def f1(predictions: Tensor, references: Tensor) -> float:
    """The harmonic mean of precision and recall of class 1, as `sklearn.metrics.f1_score` has it for two classes."""
    right = int(((predictions == 1) & (references == 1)).sum())
    named = int((predictions == 1).sum()) + int((references == 1).sum())
    return 2 * right / named if named else 0.0


def matthews_correlation(predictions: Tensor, references: Tensor) -> float:
    """Matthews' correlation of any number of classes. Source: Gorodkin 2004, as `sklearn.metrics.matthews_corrcoef`."""
    classes = int(max(predictions.max(), references.max())) + 1
    table = torch.bincount(references * classes + predictions, minlength=classes**2).view(classes, classes).double()
    total, right = table.sum(), table.trace()
    named, true = table.sum(0), table.sum(1)  # (classes,): how often each class was predicted, and how often it was so
    spread = (total**2 - named @ named) * (total**2 - true @ true)
    return float((right * total - named @ true) / spread.sqrt()) if spread > 0 else 0.0


def pearson(predictions: Tensor, references: Tensor) -> float:
    """Pearson's correlation, as `scipy.stats.pearsonr`."""
    x, y = (values.double() - values.double().mean() for values in (predictions, references))
    spread = (x @ x) * (y @ y)
    return float((x @ y) / spread.sqrt()) if spread > 0 else 0.0


def spearmanr(predictions: Tensor, references: Tensor) -> float:
    """Spearman's correlation: Pearson's of the ranks, as `scipy.stats.spearmanr`."""
    return pearson(_ranks(predictions), _ranks(references))


def _ranks(values: Tensor) -> Tensor:
    """The ranks of the values, from 1; equal values share the mean of theirs. float64"""
    _, which, counts = torch.unique(values.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearmanr,
}


def score(names: Sequence[str], predictions: Tensor, references: Tensor) -> dict[str, float]:
    """The metrics by name, and `score`, their mean, by which GLUE ranks a task and the best evaluation is chosen."""
    found = {name: METRICS[name](predictions, references) for name in names}
    return found | {"score": sum(found.values()) / len(found)}
