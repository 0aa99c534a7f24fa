"""The parts of the page that are words and numbers: the figures of a run, the table of runs, what went wrong."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from peft_pretraining.report.drawing import plain_number
from peft_pretraining.report.groups import (
    Group,
    Spread,
    differing,
    peak_bytes,
    spread,
    state_bytes,
    tokens_per_second,
)
from peft_pretraining.report.memory import size_of
from peft_pretraining.report.records import INCIDENTS, RunRecord

MAX_INCIDENTS = 200  # of a run, listed one by one


def status(run: RunRecord) -> str:
    """How far the run has come, in a few words."""
    total = run.args.get("num_training_steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    if not len(run.updates["update"]):
        return "no update recorded yet"
    if run.end is not None:
        return f"finished after {run.last_update:,} updates"
    return f"update {run.last_update:,}{of}, not finished"


def figures(run: RunRecord) -> str:
    """The figures of one run that one asks for first."""
    seconds = run.updates["seconds"]
    tokens = run.updates["tokens_seen"]
    shown = {
        **({"score": _score(run.score)} if run.scored else {"validation perplexity": _perplexity(run.perplexity)}),
        "updates": f"{run.last_update:,}",
        "tokens": plain_number(tokens[-1]) if len(tokens) and math.isfinite(tokens[-1]) else "–",
        "training time": duration(seconds[-1]) if len(seconds) else "–",
        "tokens a second": _known(tokens_per_second(run), plain_number),
        "optimizer state": _known(state_bytes(run), size_of),
        "peak memory": _known(peak_bytes(run), size_of),
    }
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown.items())
    return f'<dl class="figures">{items}</dl>'


def comparison(groups: Sequence[Group], *, swatch: Callable[[Group], str]) -> str:
    """The table of the groups: what they came to."""
    seeds = any(len(group.runs) > 1 for group in groups)
    scored = {run.scored for group in groups for run in group.runs}
    judged = [name for name, is_score in (("validation perplexity", False), ("score", True)) if is_score in scored]
    heads = ["run", *(["seeds"] if seeds else []), *judged, "tokens a second", "optimizer state", "peak memory",
             "updates", "incidents"]  # fmt: skip
    rows = [
        [
            f"{swatch(group)} {escape(group.label)}",
            *([_seeds(group)] if seeds else []),
            *[_judgement(group, name) for name in judged],
            *_results(group),
        ]
        for group in groups
    ]
    return table(heads, rows, numbers=True)


def differences(groups: Sequence[Group]) -> str:
    """The table of the arguments in which groups differ, as narrow as can be; empty if there are none."""
    keys = differing(groups)
    if len(keys) < len(groups):
        rows = [[escape(group.label), *(escape(shown(group.args.get(key))) for key in keys)] for group in groups]
        return table(["run", *keys], rows) if keys else ""
    rows = [[escape(key), *(escape(shown(group.args.get(key))) for group in groups)] for key in keys]
    return table(["argument", *(group.label for group in groups)], rows)


def _judgement(group: Group, name: str) -> str:
    if name == "score":
        return with_spread(spread([run.score for run in group.runs]), words=_score)
    return with_spread(spread([run.perplexity for run in group.runs]))


def _results(group: Group) -> list[str]:
    runs = group.runs
    updates = sorted({run.last_update for run in runs})
    incidents = sum(len(run.incidents) for run in runs)
    return [
        _mean(spread([tokens_per_second(run) for run in runs]), plain_number),
        _mean(spread([state_bytes(run) for run in runs]), size_of),
        _mean(spread([peak_bytes(run) for run in runs]), size_of),
        " to ".join(f"{update:,}" for update in dict.fromkeys((updates[0], updates[-1])))
        + ("" if all(run.end for run in runs) else ", not finished"),
        f"{incidents:,}" if incidents else "none",
    ]


def _seeds(group: Group) -> str:
    return ", ".join(escape(shown(run.args.get("seed"))) for run in group.runs)


def _perplexity(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.2f}" if math.isfinite(value) else "not finite"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def with_spread(figure: Spread | None, *, words: Callable[[float | None], str] = _perplexity) -> str:
    """A perplexity, or another figure, with half the range of its runs: 24.10 ± 0.03."""
    if figure is None:
        return "not evaluated"
    half = f" ± {words(figure.half_range)}" if figure.runs > 1 and math.isfinite(figure.mean) else ""
    return f"{words(figure.mean)}{half}"


def _mean(figure: Spread | None, words: Callable[[float], str]) -> str:
    return _known(figure.mean if figure else None, words)


def _known(value: float | None, words: Callable[[float], str]) -> str:
    return words(value) if value is not None and math.isfinite(value) else "–"


def memory_events(run: RunRecord) -> str:
    """When memory was planned and measured; empty if the record has no such events."""
    rows = [
        [escape(shown(event.get(key))) for key in ("when", "update")]
        + [_size(event.get(key)) for key in ("planned_peak", "measured_peak")]
        for event in run.memory
    ]
    return table(["when", "update", "planned", "measured"], rows) if rows else ""


def _size(value: Any) -> str:
    return size_of(value) if isinstance(value, (int, float)) else "–"


def incidents(groups: Sequence[Group]) -> str:
    """What went wrong in each run, one line an incident; a sentence where nothing did."""
    runs = [run for group in groups for run in group.runs]
    parts = []
    for run in runs:
        if run.incidents:
            rows = [[f"update {each.update:,}", each.kind, escape(each.text)] for each in run.incidents[:MAX_INCIDENTS]]
            left = len(run.incidents) - len(rows)
            more = f"<p>{left:,} more are in metrics.jsonl.</p>" if left else ""
            counts = (_counted(run.happened(kind), kind) for kind in INCIDENTS.values() if run.happened(kind))
            parts.append(
                f"<h3>{escape(run.name)}: {', '.join(counts)}</h3>" + table(["when", "what", "detail"], rows) + more
            )
    if not parts:
        parts = ["<p>No bad updates, no unreadable documents, no rollbacks and no resumes.</p>"]
    unreadable = [f"{run.name}: {run.unreadable}" for run in runs if run.unreadable]
    if unreadable:
        parts.append(
            f"<p>Lines of metrics.jsonl that are not JSON, and were left out: {escape(', '.join(unreadable))}.</p>"
        )
    return "".join(parts)


def _counted(count: int, kind: str) -> str:
    return f"{count:,} {kind}" if count == 1 or kind.endswith("s") else f"{count:,} {kind}s"


def arguments(group: Group) -> str:
    """Everything that the figures of a group depend on, folded away."""
    run = group.runs[0]
    start = {key: value for key, value in run.start.items() if key not in ("event", "args", "groups")}
    parts = [table(["argument", "value"], [[escape(key), escape(shown(value))] for key, value in run.args.items()])]
    flat = [[escape(key), escape(shown(value))] for key, value in start.items()]
    parts.append(table(["circumstance", "value"], flat) if flat else "")
    folders = escape(", ".join(each.name for each in group.runs))
    return f"<details><summary>{escape(group.label)}: {folders}</summary>{''.join(parts)}</details>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table of cells that are HTML already. Each cell knows its heading, for narrow windows, where rows are cards.

    numbers: whether all columns but the first hold numbers.
    """
    kind = "table numbers" if numbers else "table"
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td data-of="{escape(name)}">{cell}</td>' for name, cell in zip(heads, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="{kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any) -> str:
    """A value of the record as text."""
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def duration(seconds: float) -> str:
    """A time in words: 3 h 20 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours / 24:.1f} days"
