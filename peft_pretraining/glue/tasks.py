"""The tasks of GLUE: which columns hold the texts, what the labels mean, and how a model is judged.

Source: Wang et al. 2018, "GLUE", arXiv 1804.07461, and the columns of the data set nyu-mll/glue on the hub.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """One row of the table.

    columns: the columns with the text, or the pair of texts.
    labels: the names of the classes in the order of their numbers; none for a regression.
    metrics: names of metrics.METRICS.
    evaluations: names of the splits to evaluate on, the first of which decides what is best.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    evaluations: tuple[str, ...] = ("validation",)


ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("entailment", "neutral", "contradiction")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "stsb": GlueTask(("sentence1", "sentence2"), (), ("pearson", "spearmanr")),
    "mnli": GlueTask(("premise", "hypothesis"), MNLI, evaluations=("validation_matched", "validation_mismatched")),
    "qnli": GlueTask(("question", "sentence"), ENTAILMENT),
    "rte": GlueTask(("sentence1", "sentence2"), ENTAILMENT),
    "wnli": GlueTask(("sentence1", "sentence2"), ("not_entailment", "entailment")),
}
