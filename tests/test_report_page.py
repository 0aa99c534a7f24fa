"""The page of a run: what is read from the record, what is drawn of it, and that the file needs nothing else."""

import json
import re
import time

import numpy as np
import pytest
from support.browser import Browser, find_chromium
from support.command_line import message_of, refusal
from support.run_records import (
    end,
    evaluation,
    matrices,
    scores,
    start,
    subspaces,
    update,
    whole_run,
    write,
)

from peft_pretraining.cli.flags import FLAGS
from peft_pretraining.report import page
from peft_pretraining.report.__main__ import main
from peft_pretraining.report.groups import UNCOMPARED, differing, group_runs, spread
from peft_pretraining.report.heat_maps import refresh_rates
from peft_pretraining.report.memory import MEASURED_PEAK, PLANNED_PEAK, memory_of
from peft_pretraining.report.records import read_run
from peft_pretraining.report.series import band_of, envelope, smooth, thin, visible
from peft_pretraining.report.tables import with_spread

PICTURES = 12  # on the page of a run that projects: 2 x 3 axes, 3 curves, memory, 2 heat maps


def pictures(text: str) -> list[str]:
    """The titles of the pictures of a page."""
    return re.findall(r'<svg role="img" aria-label="([^"]*)"', text)


def test_lines_of_lost_work_do_not_count(tmp_path):
    """After a resume and a rollback, the last line of an update wins, and what came after the checkpoint is gone."""
    lines = [start(), *(update(n, loss=9.0) for n in range(1, 8)), evaluation(6, perplexity=50.0)]
    lines += [subspaces(6, refreshes={"a": 3}), start(), {"event": "resume", "update": 4, "checkpoint": "x"}]
    lines += [*(update(n, loss=5.0) for n in range(5, 9)), evaluation(8, perplexity=40.0)]
    lines += [{"event": "rollback", "update": 8, "loss": 99.0, "to": 7}, update(8, loss=None)]
    lines += [{"event": "bad_update", "update": 8, "loss": None, "parameters": ["w", "v"]}]
    run = read_run(write(tmp_path, lines, cut='{"event": "upd'))
    assert run.updates["update"].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    np.testing.assert_array_equal(run.updates["loss"], [9, 9, 9, 9, 5, 5, 5, np.nan])
    assert not len(run.evals["update"]) and not run.subspaces and run.perplexity is None
    assert [(each.update, each.kind) for each in run.incidents] == [(4, "resume"), (8, "rollback"), (8, "bad update")]
    assert run.unreadable == 1 and run.end is None


def test_time_is_that_of_the_updates(tmp_path):
    """Half a second each; a run that goes on from another folder does not know how long the updates before it took."""
    run = read_run(write(tmp_path / "a", [start(), *(update(n) for n in range(1, 5))]))
    assert run.updates["seconds"].tolist() == [0.5, 1.0, 1.5, 2.0]
    run = read_run(write(tmp_path / "b", [start(), *(update(n) for n in range(1001, 1005))]))
    assert run.updates["seconds"].tolist() == [0.5, 1.0, 1.5, 2.0]


def test_thinning_keeps_extremes_and_gaps():
    y = np.sin(np.arange(100_000) / 500)
    y[31_415], y[77_777], y[50_000:52_000] = 40.0, -40.0, np.nan
    kept = thin(y, points=1500)
    assert len(kept) <= 1500 and {0, 31_415, 77_777, 99_999} <= set(kept.tolist())
    assert np.isnan(y[kept]).any() and (np.diff(kept) > 0).all()
    first, low, high = envelope(y, stretches=375)
    assert len(first) == 375 and np.nanmax(high) == 40 and np.nanmin(low) == -40 and np.isnan(high).any()


def test_smoothing_keeps_level_and_slope_and_passes_over_gaps():
    line = 3.0 * np.arange(200)
    np.testing.assert_allclose(smooth(line, window=21)[30:-30], line[30:-30])
    line[100] = np.nan
    assert np.isfinite(smooth(line, window=21)).all()
    np.testing.assert_array_equal(smooth(line, window=1), line)


def test_the_range_of_an_axis_leaves_out_the_fall_and_the_outliers():
    """The first tenth of the longest line, at most half of a short one, and two values in a thousand."""
    fall = np.concatenate([np.linspace(90, 4, 100), np.full(900, 3.0), [np.nan]])
    fall[500] = 1000.0
    assert visible([fall, np.array([60.0, 50.0, 4.0, 4.0])], skip=0.1, outliers=0.002) == pytest.approx((2.95, 4.05))
    assert visible([fall], skip=0.0, outliers=0.0) == pytest.approx((3 - 0.05 * 997, 1000 + 0.05 * 997))
    assert visible([np.array([np.nan])], skip=0.1, outliers=0.0) is None


def test_seeds_are_a_group_and_a_band(tmp_path):
    """Mean, minimum and maximum of three seeds, as far as all of them have come."""
    runs = [
        read_run(whole_run(tmp_path / f"s{i}", seed=i, save_dir=f"runs/s{i}", gain=gain, updates=updates))
        for i, (gain, updates) in enumerate([(0.0, 100), (0.25, 80), (1.25, 100)])
    ]
    (group,) = group_runs(runs)
    assert [run.args["seed"] for run in group.runs] == [0, 1, 2]
    band = band_of(group.runs, "perplexity", axis="tokens_seen", evals=True)
    np.testing.assert_allclose(band.mean, [50.5, 25.5, 1000 / 60 + 0.5, 13.0])
    np.testing.assert_allclose(band.high - band.low, 1.25)
    assert band.x.tolist() == [512 * n for n in (20, 40, 60, 80)]
    assert with_spread(spread([24.0, 24.5, None])) == "24.25 ± 0.25"
    assert with_spread(spread([None])) == "not evaluated"


def test_groups_are_named_by_what_tells_them_apart(tmp_path):
    flags = [{}, {"lr": 0.02}, {"optimizer": "adamw", "rank": None}, {"optimizer": "adamw", "proj_quant": True}]
    runs = [read_run(whole_run(tmp_path / f"{i}", seed=i, updates=20, **each)) for i, each in enumerate(flags)]
    groups = group_runs(runs)
    assert differing(groups) == ["optimizer", "lr", "proj_quant"]
    assert [group.label for group in groups] == [
        "galore_adamw, lr 0.01", "galore_adamw, lr 0.02", "adamw, lr 0.01", "adamw, lr 0.01, proj_quant"]  # fmt: skip
    assert [group.label for group in group_runs(runs[1:3])] == ["galore_adamw", "adamw"]
    assert [group.label for group in group_runs(runs[:1])] == ["galore_adamw"]


def test_what_is_not_compared_is_a_flag_that_trains_nothing():
    others = {"config", "ignored"}  # no flag of their own, but beside the arguments in a record
    assert UNCOMPARED - others <= FLAGS.keys()
    assert not UNCOMPARED & {"optimizer", "lr", "rank", "model_config", "dataset", "total_batch_size", "dtype"}


def test_refreshes_are_counted_between_evaluations(tmp_path):
    """Rows kind by kind and layer by layer; 2 refreshes in 20 updates, then 3 in 10."""
    first = {name: 2 for name in matrices(12)}
    second = first | {"model.layers.10.mlp.up_proj.weight": 5}
    lines = [start(), *(update(n) for n in range(1, 31)), subspaces(20, refreshes=first)]
    grid = refresh_rates(read_run(write(tmp_path, [*lines, subspaces(30, refreshes=second)])))
    assert grid.edges.tolist() == [0, 20, 30]
    assert [name.split(".")[2] for name in grid.names[:12]] == [str(layer) for layer in range(12)]
    row = grid.names.index("model.layers.10.mlp.up_proj.weight")
    assert row == 5 * 12 + 10 and grid.values[row].tolist() == [10, 30]
    assert grid.values[:, 0].tolist() == [10] * 84 and grid.values[:, 1].sum() == 30


def test_memory_is_the_fullest_plan_beside_the_peak(tmp_path):
    def event(peak, measured, **planned):
        return {"event": "memory", "update": 1, "when": "x", "planned": planned, "planned_peak": peak,
                "measured_peak": measured}  # fmt: skip

    events = [event(90, 95, weights=80, gradients=10), event(120, None, weights=80, bases=40)]
    lines = [start(), update(1), *events, end(1, weights=80)]
    assert memory_of(read_run(write(tmp_path / "a", lines))) == {
        "weights": 80, "bases": 40, PLANNED_PEAK: 120, MEASURED_PEAK: 95}  # fmt: skip
    lines = [start(), update(1), end(1, weights=80, scales=0, moments=160)]
    assert memory_of(read_run(write(tmp_path / "b", lines))) == {"weights": 80, "moments": 160}
    text = page.report([read_run(tmp_path / "a")])
    assert "Memory by kind" in pictures(text) and "at the peak of the plan" in text


def test_a_page_needs_nothing_but_itself(tmp_path):
    """No address, no script, no id twice; every picture of a run and of a comparison is there."""
    names = [whole_run(tmp_path / name, optimizer=name) for name in ("galore_adamw", "apollo", "x<y>&\"'")]
    for runs, count in ((names[:1], PICTURES), (names, PICTURES + 4)):
        text = page.report([read_run(run) for run in runs])
        titles = pictures(text)
        assert len(titles) == count and {"Training loss against tokens", "Refreshes per 100 updates"} <= set(titles)
        for element in re.findall(r'(?:href|src)="([^"]*)"', text):
            assert element.startswith(("#", "data:image/png;base64,"))
        assert not re.search(r"<script|<link|@import|url\((?!#)|<style type|#0102", text)
        ids = re.findall(r'\bid="([^"]*)"', text)
        assert len(ids) == len(set(ids)) > 100
        assert {link[1:] for link in re.findall(r'href="(#[^"]*)"', text)} <= set(ids)
    assert "x<y>" not in text and "x&lt;y&gt;&amp;" in text


@pytest.mark.parametrize("lines, words, count", [
    ([start()], ["no update recorded yet", "no finite value", "no evaluation yet", "no figures of memory"], 0),
    ([start(), update(1)], ["update 1 of 100, not finished", "There is no evaluation yet"], 6),
    ([start(), *(update(n, loss=None, grad_norm=None) for n in range(1, 9))], ["no finite value is recorded"], 2),
    ([start(optimizer="adamw"), update(1), evaluation(1, perplexity=None)], ["not finite", "adamw projects no"], 6),
    ([start(), update(1), evaluation(1, perplexity=9.0), subspaces(1, refreshes={"odd": 1})],
     ["refreshes are not lazy", "9.00"], 10),
    ([update(1), update(2, tokens_seen=None, tokens_per_second="fast")], ["update 2, not finished"], 6),
    ([start(), {"event": "update"}, {"event": "eval", "update": None}, {"event": "subspaces", "update": 3}, update(2),
      {"event": "bad_update", "update": 2}], ["1 bad update", "loss not finite"], 6),
])  # fmt: skip
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_record_with_little_in_it_is_drawn_or_says_why_not(tmp_path, lines, words, count):
    text = page.report([read_run(write(tmp_path, lines, cut="{"))])
    assert all(word in text for word in words), [word for word in words if word not in text]
    assert len(pictures(text)) == count


def test_a_classifier_is_shown_by_its_score(tmp_path):
    """That of the first split, in the curve, the figures and the comparison, where a perplexity has no place."""
    runs = []
    for seed, gain in ((0, 0.0), (1, 0.125)):
        lines = [start(seed=seed, save_dir=f"runs/{seed}"), *(update(n) for n in range(1, 21))]
        lines += [scores(10, score=0.5 + gain), scores(20, score=0.75 + gain), end(20)]
        runs.append(read_run(write(tmp_path / str(seed), lines)))
    assert [run.score for run in runs] == [0.75, 0.875] and runs[0].perplexity is None
    alone, together = page.report(runs[:1]), page.report(runs)
    assert "Score against updates" in pictures(alone) and "0.7500" in alone
    assert "0.8125 ± 0.0625" in together
    for text in (alone, together):
        assert "perplexity" not in text.lower().partition("<details>")[0]


def test_the_users_own_matplotlib_style_does_not_show(tmp_path):
    import matplotlib

    run = read_run(whole_run(tmp_path, optimizer="$x^{$"))
    text = page.report([run])
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False, "text.color": "red"}):
        assert page.report([run]) == text


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys, monkeypatch):
    def refused(*flags):
        return refusal(flags, capsys, program=main)

    run = whole_run(tmp_path / "run", updates=20)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "foreign", [{"event": "boot"}], cut="\x00\xff")
    assert "no such folder. Give the --save_dir" in refused(tmp_path / "none")
    assert "there is no metrics.jsonl in it" in refused(tmp_path / "empty")
    assert "no line of a run's record" in refused(tmp_path / "foreign")
    assert "Make it, or give another -o" in refused(run, "-o", tmp_path / "none" / "a.html")
    assert "is a folder" in refused(run, "-o", tmp_path)
    assert "is the record of a run" in refused(run, "-o", run / "metrics.jsonl")
    assert "RUN" in refused()
    monkeypatch.setattr("peft_pretraining.report.__main__.find_spec", lambda name: None)
    assert "pip install matplotlib" in refused(run)
    monkeypatch.undo()
    assert main([str(run / "metrics.jsonl"), "-o", str(tmp_path / "a.html")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.html'}\n" and len(list(tmp_path.glob(".a.html*"))) == 0
    assert len(pictures((tmp_path / "a.html").read_text())) == PICTURES
    assert "the --save_dir" in message_of(lambda: read_run(tmp_path / "none"))


@pytest.mark.slow
def test_a_page_of_a_long_run_is_small_and_soon_made(tmp_path):
    """100,000 updates and 224 matrices in 100 evaluations: under a megabyte, in seconds."""
    names, count = matrices(32), 100_000
    noise = np.random.default_rng(0).normal(size=count)
    with open(write(tmp_path, [start(num_training_steps=count)]) / "metrics.jsonl", "a") as file:
        for number in range(1, count + 1):
            lines = [update(number, loss=3 + float(noise[number - 1]), grad_norm=1 + abs(float(noise[-number])))]
            if number % 1000 == 0:
                counts = {name: number // (300 + 7 * i) for i, name in enumerate(names)}
                lines += [evaluation(number, perplexity=20 + 1e5 / number)]
                lines += [subspaces(number, refreshes=counts, overlap=number / count)]
            file.writelines(json.dumps(line) + "\n" for line in lines)
    began = time.process_time()
    page.write_report([tmp_path], tmp_path / "report.html")
    assert time.process_time() - began < 20
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < 1_000_000 and len(pictures(text)) == PICTURES - 1  # no record of memory


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: apt-get install chromium")
def test_a_browser_shows_every_picture(tmp_path, tiny):
    """A real run, and a comparison with seeds: narrow, middling and wide, light and dark, and on paper."""
    from support.runs import run

    names = [("galore_adamw", 0), ("galore_adamw", 1), ("q_galore_adamw8bit", 0), ("adamw", 0)]
    folders = [tmp_path / f"{optimizer}-{seed}" for optimizer, seed in names]
    for folder, (optimizer, seed) in zip(folders, names, strict=True):
        projected = {} if optimizer == "adamw" else {"rank": 4, "update_proj_gap": 3}
        run(tiny, folder, optimizer=optimizer, seed=seed, no_report=None, num_training_steps=12, eval_every=4,
            save_every=50, **projected)  # fmt: skip
    assert main([*map(str, folders), "-o", str(tmp_path / "three.html")]) == 0
    papers = {}
    with Browser(find_chromium()) as browser:
        for path, count in ((folders[2] / "report.html", PICTURES), (tmp_path / "three.html", PICTURES + 1)):
            for width in (375, 800, 1600):
                for dark in (False, True):
                    browser.open(path, width=width, dark=dark)
                    check_page(browser, width=width, count=count)
                    papers[dark] = browser.value("getComputedStyle(document.body).backgroundColor")
            browser.open(path, width=800, media="print")
            check_page(browser, width=800, count=count)
            assert visible_pictures(browser) == count
    assert papers == {False: "rgb(255, 255, 255)", True: "rgb(20, 23, 28)"}


def check_page(browser: Browser, *, width: int, count: int) -> None:
    """No request but for the file, no error, nothing wider than the window, every picture with its letters in it."""
    requests = [each["request"]["url"] for each in browser.happened("Network.requestWillBeSent")]
    assert [url.partition(":")[0] for url in requests if not url.startswith("data:")] == ["file"]
    assert not browser.happened("Runtime.exceptionThrown") and not browser.happened("Log.entryAdded")
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('figure svg').length") == count
    if width < 1120:  # one axis at a time, chosen by buttons
        shown = []
        for axis in ("tokens_seen", "seconds", "update"):
            browser.value(f"document.getElementById('axis-{axis}').click()")
            shown.append(visible_pictures(browser))
        assert shown == [count - 4] * 3 or browser.value("matchMedia('print').matches")
    else:
        assert visible_pictures(browser) == count
    outside = """[...document.querySelectorAll('figure svg')].filter(svg => svg.clientHeight).flatMap(svg => {
        const box = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => {
            const own = text.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1;
        }).map(text => svg.ariaLabel + ': ' + text.textContent);
    })"""
    assert browser.value(outside) == []


def visible_pictures(browser: Browser) -> int:
    """How many pictures have a size on the page."""
    return browser.value("[...document.querySelectorAll('figure svg')].filter(s => s.clientHeight > 100).length")
