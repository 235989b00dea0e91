"""The page's controls in a real browser: sorting, log scale, smoothing, zoom, confusion matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlx_fed.monitoring.dashboard import serving
from mlx_fed.runs.history import History

from ..helpers.pages import IN_A_BROWSER, add_round, begun, make, readout, written

pytestmark = IN_A_BROWSER
MATRIX = [[8, 2, 0], [1, 9, 0], [0, 0, 0]]


def names(page: Any) -> list[str]:
    return page.locator("#runs label span").all_inner_texts()


def shown_range(page: Any, axis: str = "x", at: int = 0) -> list[float]:
    """The first and last value on an axis of each chart of metrics, of one of them."""
    scales = (
        f"[...curves.kept.values()].map(({{ u }}) => [u.scales.{axis}.min, u.scales.{axis}.max])"
    )
    return page.evaluate(scales)[at]


def lines(page: Any, title: str) -> list[dict[str, Any]]:
    """The width, colour and values of each line of a chart."""
    chart = f"curves.kept.get({title!r}).u"
    return page.evaluate(
        f"{chart}.series.slice(1).map((line, k) => "
        f"({{ width: line.width, colour: line.stroke(), values: {chart}.data[k + 1] }}))"
    )


def test_runs_are_sorted_by_each_column_and_back(visit, tmp_path: Path):
    runs = tmp_path / "runs"
    for name, rounds in (("run-2", 6), ("run-10", 3), ("run-1", 9)):
        make(runs / name, rounds=rounds)
    begun(runs / "empty", 3)
    with serving(runs, port=0) as address:
        page = visit(address)
        page.get_by_label("run-10", exact=True).wait_for()
        newest = names(page)
        assert newest[0] == "empty"
        page.get_by_label("empty", exact=True).click()
        page.get_by_text("No run is selected.").wait_for()
        page.get_by_label("run-1", exact=True).check()
        accuracy = page.get_by_role("button", name="evaluate accuracy")
        accuracy.click()
        assert names(page) == ["run-1", "run-2", "run-10", "empty"]
        page.keyboard.press("Enter")  # the button has kept the focus
        assert names(page) == ["run-10", "run-2", "run-1", "empty"]
        header = page.locator("#runs th", has=accuracy)
        assert header.get_attribute("aria-sort") == "ascending"
        page.keyboard.press("Enter")
        assert names(page) == newest
        page.get_by_role("button", name="run", exact=True).click()
        assert names(page) == ["empty", "run-1", "run-2", "run-10"]
        text = page.locator("#runs").inner_text()
        assert "9 of 9" in text  # known of runs that were not selected, too
        assert "4.6 s" in text
        assert "0.2222 @ 9" in text
        page.locator("#best").select_option("last")
        assert "@" not in page.locator("#runs").inner_text()
        assert page.locator("#runs tr", has_text="run-10").inner_text().split()[-6:-4] == [
            "0.6667",
            "0.6667",
        ]


def test_the_best_of_a_metric_is_its_lowest_or_highest(visit, tmp_path: Path):
    history = begun(tmp_path / "one", 3)
    for number, loss in ((1, 0.9), (2, 0.3), (3, 0.7)):
        evaluated = {"loss": loss, "accuracy": 1 - loss, "nodes": ["a"]}
        history.add_round({"round": number, "evaluate": evaluated})
    page = visit(written(tmp_path, tmp_path / "one"))
    assert "0.3 @ 2" in page.locator("#runs").inner_text()
    assert "0.7 @ 2" in page.locator("#runs").inner_text()
    page.locator("#best").select_option("last")
    last = page.locator("#runs").inner_text().split()
    assert {"0.7", "0.3"} <= set(last)
    assert "@" not in last


def test_a_log_scale_leaves_out_what_has_none(visit, tmp_path: Path):
    history = begun(tmp_path / "one", 4)
    for number, loss in enumerate((10.0, 0.1, 0.0, -1.0), 1):
        history.add_round({"round": number, "evaluate": {"loss": loss, "nodes": ["a"]}})
    page = visit(written(tmp_path, tmp_path / "one"))
    low, high = shown_range(page, "y")
    assert low <= -1
    page.get_by_label("Log scale").focus()
    page.keyboard.press("Space")
    low, high = shown_range(page, "y")
    assert 0 < low <= 0.1
    assert high >= 10
    assert lines(page, "Evaluation · loss")[-1]["values"] == [10, 0.1, None, None]
    page.keyboard.press("Space")
    assert shown_range(page, "y")[0] <= -1


def test_smoothing_draws_a_mean_beside_the_values_that_are_read(visit, tmp_path: Path):
    history = begun(tmp_path / "one", 4)
    losses = [1.0, 0.0, None, 1.0]
    for number, loss in enumerate(losses, 1):
        history.add_round({"round": number, "evaluate": {"loss": loss, "nodes": ["a"]}})
    page = visit(written(tmp_path, tmp_path / "one"))
    page.get_by_label("Smoothing").fill("0.5")
    smooth, exact = lines(page, "Evaluation · loss")
    mean, total, expected = 0.0, 0.0, []
    for loss in losses:
        if loss is not None:
            mean, total = 0.5 * mean + 0.5 * loss, 0.5 * total + 0.5
        expected.append(None if loss is None else pytest.approx(mean / total))
    assert smooth["values"] == expected
    assert exact["values"] == losses
    assert smooth["width"] > exact["width"]
    assert readout(page, "Evaluation · loss").split() == ["round", "4", "all", "1"]
    page.get_by_label("Smoothing").press("Home")
    assert len(lines(page, "Evaluation · loss")) == 1


def test_all_charts_zoom_together_by_pointer_keyboard_and_back(visit, tmp_path: Path):
    make(tmp_path / "one", rounds=40)
    page = visit(written(tmp_path, tmp_path / "one"))
    everything = page.get_by_role("button", name="Show all rounds")
    assert not everything.is_visible()
    box = page.locator("#curves .u-over").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=4)
    page.mouse.up()
    for chart in range(3):
        assert shown_range(page, at=chart) == pytest.approx([10.75, 30.25], abs=0.5)
    loss = shown_range(page, "y")
    assert loss[1] < 0.5  # the axis is that of the rounds that are shown
    page.locator("#curves .u-over").nth(1).dblclick()
    assert shown_range(page) == [1, 40]
    page.locator("#curves .plot").first.focus()
    page.keyboard.press("Home")
    page.keyboard.press("+")
    assert shown_range(page, at=2) == [1, 20.5]
    page.keyboard.press("+")
    page.keyboard.press("-")
    assert shown_range(page) == [1, 20.5]
    everything.click()
    assert shown_range(page) == [1, 40]
    assert not everything.is_visible()
    page.keyboard.press("+")  # the first chart has the focus
    page.keyboard.press("Escape")
    assert shown_range(page) == [1, 40]


def test_a_zoom_stays_while_a_run_goes_on(visit, tmp_path: Path):
    with serving(tmp_path / "runs", port=0) as address:
        history = make(tmp_path / "runs" / "one", rounds=20, finish=False)
        page = visit(address)
        page.locator("#curves .plot").first.focus()
        page.keyboard.press("Home")
        page.keyboard.press("+")
        assert shown_range(page) == [1, 10.5]
        add_round(history, 21, 21, 4, [])
        page.wait_for_function("() => runs.get('one').rounds.length === 21")
        assert shown_range(page) == [1, 10.5]
        page.keyboard.press("Escape")
        assert shown_range(page) == [1, 21]


@pytest.mark.parametrize("clients", [3, 7, 8])
def test_few_nodes_have_colours_of_their_own(visit, tmp_path: Path, clients: int):
    make(tmp_path / "one", clients=clients)
    page = visit(written(tmp_path, tmp_path / "one"))
    colours = {line["colour"] for line in lines(page, "Training · loss") if 1 <= line["width"] <= 2}
    assert (len(colours) == clients + 1) == (clients <= 7)
    assert ("node-2" in readout(page, "Training · loss")) == (clients <= 7)


def with_matrix(folder: Path) -> None:
    make(folder, rounds=2)
    evaluated = {"loss": 1.0, "confusion": MATRIX, "nodes": ["a"]}
    packed = {"classes": 3, "cells": [0, 5, 8, 5]}
    record = {"round": 3, "evaluate": evaluated, "central": {"confusion": packed}}
    History(folder).add_round(record)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_confusion_matrix_is_read_by_pointer_and_keyboard(visit, tmp_path: Path, scheme: str):
    with_matrix(tmp_path / "one")
    page = visit(written(tmp_path, tmp_path / "one"), color_scheme=scheme)
    heading = page.locator("#h-confusion small")
    heading.get_by_text("after round 3: accuracy 0.85 on 20 examples").wait_for()
    assert page.locator("#confusion-scale").inner_text().split()[-4:] == [
        "of",
        "a",
        "label's",
        "examples",
    ]
    canvas, cell = page.locator("#confusion canvas"), page.locator("#confusion-cell")
    canvas.focus()
    page.keyboard.press("ArrowLeft")  # the first key shows the last column
    page.keyboard.press("ArrowLeft")
    assert cell.inner_text() == "label 0 predicted as 1: 2 of 10, 20 %"
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2)
    assert cell.inner_text() == "label 1 predicted as 0: 1 of 10, 10 %"
    page.get_by_text("Accuracy of each class").click()
    rows = page.locator("#confusion-classes tr").all_inner_texts()
    assert [row.split() for row in rows[1:]] == [
        ["0", "10", "0.8"],
        ["1", "10", "0.9"],
        ["2", "0", "\N{EN DASH}"],
    ]
    page.locator("#matrix").select_option("central/confusion")
    heading.get_by_text("accuracy 1 on 10 examples").wait_for()


def test_a_run_without_a_matrix_has_no_place_for_one(visit, tmp_path: Path):
    make(tmp_path / "one")
    page = visit(written(tmp_path, tmp_path / "one"))
    page.locator("#curves .plot").first.wait_for()
    assert not page.locator("#s-confusion").is_visible()


def test_the_controls_fit_a_phone_and_come_by_tab(visit, tmp_path: Path):
    with_matrix(tmp_path / "one")
    size = {"width": 360, "height": 740}
    page = visit(written(tmp_path, tmp_path / "one"), viewport=size)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.dataset.column")
        )
    assert {"best", "state", "log", "smoothing", "matrix"} <= reached
