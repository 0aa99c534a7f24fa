"""The page: one HTML file with its pictures and its style in it, and without any script."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from peft_pretraining.report import tables
from peft_pretraining.report.curves import (
    AXES,
    GRAD_NORM,
    INCIDENT_MARKS,
    LEARNING_RATE,
    LOSS,
    PERPLEXITY,
    SCORE,
    SPEED,
    Curve,
    draw_curve,
)
from peft_pretraining.report.drawing import COLOURS, DASHES, Picture
from peft_pretraining.report.groups import Group, group_runs
from peft_pretraining.report.heat_maps import draw_overlaps, draw_refreshes
from peft_pretraining.report.memory import PLANNED_PEAK, draw_memory, memory_of
from peft_pretraining.report.records import RunRecord, read_run

MAX_HEAT_MAPS = 6  # groups whose subspaces are drawn
MARKS = {"x": "✕", "d": "◇", "v": "▽", "|": "|"}  # of INCIDENT_MARKS, as text


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Writes the page of these runs; the file is complete or as it was. Raises UserError if a record cannot be read,
    OSError if the page cannot be written."""
    text = report([read_run(run) for run in runs])
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def report(runs: Sequence[RunRecord]) -> str:
    """The page of one run, or the comparison of several, as HTML."""
    groups = group_runs(runs)
    single = runs[0] if len(runs) == 1 else None
    title = single.name if single else f"{len(runs)} runs"
    told = [_opening(groups, single), _curves(groups), _training(groups), _memory(groups), _subspaces(groups)]
    told += [_section("Incidents", tables.incidents(groups)), _arguments(groups)]
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>\n{''.join(told)}</main></body></html>\n"
    )


def _opening(groups: Sequence[Group], single: RunRecord | None) -> str:
    if single is not None:
        what = [
            single.args.get("optimizer"),
            Path(str(single.args.get("model_config", ""))).stem,
            single.start.get("device"),
        ]
        line = " · ".join(escape(str(each)) for each in [*what, tables.status(single)] if each)
        return f"<header><h1>{escape(single.name)}</h1><p>{line}</p></header>\n{tables.figures(single)}\n"
    count = sum(len(group.runs) for group in groups)
    lines = f"{len(groups)} groups of runs that differ in their seeds alone" if len(groups) < count else "one of each"
    judged = "Scores" if any(run.scored for run in _runs(groups)) else "Perplexities"
    note = f"{judged} are means over the seeds, ± half their range. " if len(groups) < count else ""
    body = tables.comparison(groups, swatch=_swatch)
    apart = tables.differences(groups)
    return (
        f"<header><h1>{count} runs</h1><p>{lines}</p></header>\n"
        + _section("Results", f"{body}<p>{note}They are those of the last evaluation.</p>")
        + (_section("What differs", apart) if apart else "")
    )


def _curves(groups: Sequence[Group]) -> str:
    """Loss and what runs are judged by, against each axis. A narrow window shows one axis, chosen by radio buttons."""
    choices, rows = "", ""
    judged = [curve for curve in (PERPLEXITY, SCORE) if (curve is SCORE) in {run.scored for run in _runs(groups)}]
    for number, (axis, label) in enumerate(AXES.items()):
        checked = " checked" if number == 0 else ""
        choices += f'<input type="radio" name="axis" id="axis-{axis}"{checked}><label for="axis-{axis}">{label}</label>'
        drawn = "".join(_drawn(curve, groups, axis=axis) for curve in (LOSS, *judged))
        rows += f'<div class="against {axis}">{drawn}</div>'
    legend = _legend(groups)
    names = ["Loss", *(curve.key for curve in judged)]
    return _section(" and ".join(names), f'{legend}<div class="axes">{choices}{rows}</div>{_reading(groups)}')


def _runs(groups: Sequence[Group]) -> list[RunRecord]:
    return [run for group in groups for run in group.runs]


def _reading(groups: Sequence[Group]) -> str:
    """How to read the curves."""
    runs = _runs(groups)
    words = ["Time is that of the updates, without evaluations."]
    if max(len(run.updates["update"]) for run in runs) >= 80:
        words.append("The loss is averaged over a fortieth of the updates.")
    if any(len(group.runs) > 1 for group in groups):
        words.append("Bands reach from the lowest to the highest seed, as far as all seeds have come.")
    kinds = dict.fromkeys(incident.kind for incident in runs[0].incidents) if len(runs) == 1 else {}
    if kinds:
        words.append("On the loss: " + ", ".join(f"{MARKS[INCIDENT_MARKS[kind]]} {kind}" for kind in kinds) + ".")
    return f"<p>{' '.join(words)}</p>"


def _training(groups: Sequence[Group]) -> str:
    drawn = "".join(_drawn(curve, groups) for curve in (LEARNING_RATE, GRAD_NORM, SPEED))
    return _section("Learning rate, gradients, speed", f'{_legend(groups)}<div class="pictures">{drawn}</div>')


def _memory(groups: Sequence[Group]) -> str:
    picture = draw_memory(groups)
    if picture is None:
        return _section("Memory", "<p>The record has no figures of memory yet.</p>")
    planned = any(PLANNED_PEAK in memory_of(group.runs[0]) for group in groups)
    what = "at the peak of the plan" if planned else "as kept between updates; the end of a run records them"
    note = f"<p>Bytes by kind, {what}. GB are of 1e9 bytes.</p>"
    details = "".join(tables.memory_events(group.runs[0]) for group in groups[:1])
    return _section(
        "Memory", f'{_legend(groups)}<div class="pictures">{_figure(picture)}<div>{note}{details}</div></div>'
    )


def _subspaces(groups: Sequence[Group]) -> str:
    """Two heat maps of the first run of each group, or why there is none."""
    parts = ""
    for group in groups[:MAX_HEAT_MAPS]:
        run, heading = group.runs[0], ""
        if len(groups) > 1 or len(group.runs) > 1:
            heading = f"<h3>{_swatch(group)} {escape(group.label)}: {escape(run.name)}</h3>"
        refreshes = draw_refreshes(run, name=f"refreshes-{group.number}")
        if refreshes is None:
            parts += f"{heading}<p>{_why_no_subspaces(run)}</p>"
            continue
        overlaps = draw_overlaps(run, name=f"overlaps-{group.number}")
        missing = "<p>No overlap was measured: refreshes are not lazy. <code>--log_details</code> measures it.</p>"
        parts += (
            f'{heading}<div class="pictures">{_figure(refreshes)}{_figure(overlaps) if overlaps else missing}</div>'
        )
    if len(groups) > MAX_HEAT_MAPS:
        parts += f"<p>The subspaces of the first {MAX_HEAT_MAPS} groups are drawn.</p>"
    return _section("Subspaces", f"{parts}<p>One row is one matrix; of each kind, the first layer is on top.</p>")


def _why_no_subspaces(run: RunRecord) -> str:
    if not len(run.evals["update"]):
        return "There is no evaluation yet: refreshes are recorded with each."
    return f"{escape(str(run.args.get('optimizer', 'This run')))} projects no matrix: there are no bases to draw."


def _arguments(groups: Sequence[Group]) -> str:
    return _section("Arguments", "".join(map(tables.arguments, groups)))


def _drawn(curve: Curve, groups: Sequence[Group], *, axis: str = "update") -> str:
    picture = draw_curve(curve, groups, axis=axis)
    if picture is not None:
        return _figure(picture)
    why = "no evaluation yet" if curve.evals else "no finite value is recorded"
    return f"<figure><figcaption>{curve.title}</figcaption><p>Nothing to draw: {why}.</p></figure>"


def _figure(picture: Picture) -> str:
    return f"<figure><figcaption>{escape(picture.title)}</figcaption>{picture.svg()}</figure>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>\n"


def _legend(groups: Sequence[Group]) -> str:
    """Which line is whose; nothing for a single group."""
    if len(groups) == 1:
        return ""
    items = "".join(f"<li>{_swatch(group)} {escape(group.label)}</li>" for group in groups)
    return f'<ul class="legend">{items}</ul>'


def _swatch(group: Group) -> str:
    """A piece of the group's line."""
    pattern = DASHES[group.number % len(DASHES)]
    dash = (
        "" if pattern == "solid" else f' stroke-dasharray="{" ".join(f"{1.8 * length:.4g}" for length in pattern[1])}"'
    )
    line = f'<line x1="0" y1="6" x2="34" y2="6" stroke="var(--c{group.number % COLOURS})" stroke-width="3"{dash}/>'
    return f'<svg class="swatch" viewBox="0 0 34 12" aria-hidden="true">{line}</svg>'
