"""The page in a real browser: Debian's chromium, headless."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from mlx_fed import events
from mlx_fed.monitoring.dashboard import serving

from ..helpers.pages import IN_A_BROWSER, NASTY, add_round, begun, make, readout, written
from ..helpers.run_folders import OLD

pytestmark = IN_A_BROWSER


def test_a_report_opens_and_shows_a_run(visit, tmp_path: Path):
    make(tmp_path / "one", seed=7)
    page = visit(written(tmp_path, tmp_path / "one"))
    assert "one finished" in " ".join(page.locator("#now").inner_text().split())
    titles = page.locator("#curves h3").all_inner_texts()
    assert titles == ["Evaluation · loss", "Evaluation · accuracy", "Training · loss"]
    assert page.locator("#s-nodes small").inner_text() == "5 of one"
    assert "7.5 MB" in page.locator("#runs").inner_text()
    page.get_by_text("All settings").click()
    assert "seed" in page.locator("#settings").inner_text()


def test_what_nodes_send_is_shown_as_text(visit, tmp_path: Path):
    make(tmp_path / "one", config={NASTY: NASTY})
    page = visit(written(tmp_path, tmp_path / "one"))
    assert f"train: cannot {NASTY}" in page.locator("#reasons").inner_text()
    page.get_by_text("Each node").click()
    page.locator("#nodes").get_by_text(NASTY, exact=True).wait_for()
    assert page.locator("img").count() == 0
    assert page.title() == "mlx-fed"


def test_values_are_read_under_the_pointer_and_by_keyboard(visit, tmp_path: Path):
    make(tmp_path / "one")
    page = visit(written(tmp_path, tmp_path / "one"))
    assert "round 5" in readout(page, "Evaluation · loss")
    plot = page.locator("#curves .u-over").first
    plot.hover(position={"x": 1, "y": 60})
    assert "round 1" in readout(page, "Evaluation · loss")
    assert "all 2" in readout(page, "Evaluation · loss")
    page.locator("#curves .plot").nth(1).focus()
    for key, shown in (("Home", "1"), ("ArrowRight", "2"), ("End", "5"), ("ArrowLeft", "4")):
        page.keyboard.press(key)
        assert f"round {shown}" in readout(page, "Evaluation · accuracy")
    canvas = page.locator("#map canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    assert "round 2" in page.locator("#cell").inner_text()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    box = canvas.bounding_box()
    cells = set()
    for row in range(5):
        page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * (row + 0.5) / 5)
        cells.add(page.locator("#cell").inner_text().partition(":")[2].partition("(")[0].strip())
    assert cells == {"trained and evaluated", "trained", "no reply in time", "failed or refused"}


def test_reasons_that_are_alike_stand_together(visit, tmp_path: Path):
    folder = tmp_path / "one"
    history = begun(folder, 3)
    for number in range(1, 4):
        late = f"no reply within 30 seconds (a delay of {30 + number}.5)"
        refused = [
            {"node": "node-1", "phase": phase, "reason": late, "missing": True}
            for phase in ("train", "evaluate")
        ]
        nan = {"node": "node-0", "phase": "train", "reason": "'w' is not finite"}
        add_round(history, number, 3, 2, [*refused, nan] if number > 1 else refused)
    page = visit(written(tmp_path, folder))
    texts = page.locator("#reasons p").all_inner_texts()
    assert [text.replace("\N{MULTIPLICATION SIGN}", "times") for text in texts] == [
        "3 times train: no reply within 30 seconds (a delay of 33.5)",
        "3 times evaluate: no reply within 30 seconds (a delay of 33.5)",
        "2 times train: 'w' is not finite",
    ]


def test_who_is_not_let_in_is_shown_with_the_reason(visit, tmp_path: Path):
    with serving(tmp_path / "runs", port=0) as address:
        folder = tmp_path / "runs" / "one"
        history = begun(folder, 3)
        history.notify(
            events.NodeRefused(node=NASTY, reason=f"its model is not the server's: {NASTY}")
        )
        page = visit(address)  # it waits for nodes, and no round has begun
        said = f"{NASTY} is not let in: its model is not the server's: {NASTY}"
        page.locator("#reasons").get_by_text(said, exact=True).wait_for()
        add_round(history, 1, 3, 4, [])
        page.get_by_text("Each node").click()
        row = page.locator("#nodes tr", has_text=NASTY)
        assert f"not let in: its model is not the server's: {NASTY}" in row.inner_text()
        history.notify(events.NodeJoined(node=NASTY, nodes=5))
        history.notify(events.Notice(text="it has the right model now"))
        page.locator("#reasons").get_by_text(said, exact=True).wait_for(state="detached")


def test_who_is_left_out_of_the_round_that_goes_on_is_shown(visit, tmp_path: Path):
    with serving(tmp_path / "runs", port=0) as address:
        history = begun(tmp_path / "runs" / "one", 3)
        history.notify(events.PhaseStarted(phase="train", round=1, of=3, nodes=2, answered=0))
        history.notify(events.ReplyRefused(node=NASTY, phase="train", reason=f"no {NASTY}"))
        history.notify(events.Notice(text="written at once"))
        page = visit(address)
        said = f"{NASTY} left out of round 1, train: no {NASTY}"
        page.locator("#reasons").get_by_text(said, exact=True).wait_for()
        with pytest.raises(RuntimeError), history.held():
            raise RuntimeError("none gave a reply")
        page.locator("#now").get_by_text("stopped").wait_for()
        assert page.locator("#reasons").get_by_text(said, exact=True).is_visible()


@pytest.mark.parametrize("clients", [3, 1000])
def test_labels_by_client_are_shown(visit, tmp_path: Path, clients: int):
    folder = tmp_path / "one"
    make(folder)
    page = visit(written(tmp_path, folder))
    assert not page.locator("#s-labels").is_visible()
    rows = [[k, [2 * (k == 0), 10 + k, 0, 30]] for k in range(clients)]
    found = {"of": 2 * clients, "classes": [3, 4, 5, 9], "clients": rows}
    (folder / "labels.json").write_text(json.dumps(found))
    page = visit(written(tmp_path, folder))
    assert "clients, those that took part first, in one" in page.locator("#h-labels").inner_text()
    half = (clients - 1) / 2
    sums = page.locator("#label-sums").inner_text()
    assert sums.split()[:6] == ["a", "client's", "least", "quartile", "median", "quartile"]
    assert f"{round(40 + half):,}" in sums
    assert sums.splitlines()[2].split("\t") == [
        "labels, of 4",
        "2",
        "2",
        "2",
        "3" if clients == 3 else "2",
        "3",
    ]
    canvas = page.locator("#labels canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 0.5, box["y"] + 60)
    shown = page.locator("#label-cell")
    assert shown.inner_text() == (
        f"client {clients - 1}, {39 + clients:,} examples: 0 of label 3, 0 %"
    )
    canvas.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    assert shown.inner_text() == "client 0, 42 examples: 10 of label 4, 24 %"
    page.keyboard.press("Escape")
    assert shown.inner_text().startswith("A column is a client")
    scale = page.locator("#label-scale").inner_text()
    assert scale.split()[:4] == ["0", "%", "5", "%"]
    assert f"the highest bar: {max(42, 39 + clients):,} examples" in scale


def test_runs_are_compared(visit, tmp_path: Path):
    make(tmp_path / "one", config={"lr": 0.1}, seed=1)
    make(tmp_path / "two", rounds=8, config={"lr": 0.25}, seed=1)
    page = visit(written(tmp_path, tmp_path / "one", tmp_path / "two"))
    differences = page.locator("#differences").inner_text().split()
    assert {"config.lr", "0.1", "0.25", "num_rounds"} <= set(differences)
    assert "seed" not in differences
    shown = readout(page, "Evaluation · loss")
    assert "two 0.25" in shown
    assert "one 0.4 (round 5)" in shown  # it has no eighth round
    page.locator("#curves .plot").first.focus()
    page.keyboard.press("Home")
    assert "one 2" in readout(page, "Evaluation · loss")
    page.keyboard.press("End")
    assert readout(page, "Evaluation · loss").split() == [
        "round",
        "8",
        "one",
        "\N{EN DASH}",
        "two",
        "0.25",
    ]
    page.get_by_label("two", exact=True).focus()
    page.keyboard.press("Space")
    assert "round 5" in readout(page, "Evaluation · loss")
    assert page.locator("#differences").inner_text() == ""


def test_a_cell_that_was_tapped_stays_read(visit, tmp_path: Path):
    make(tmp_path / "one")
    size = {"width": 390, "height": 740}
    page = visit(written(tmp_path, tmp_path / "one"), viewport=size, has_touch=True)
    canvas = page.locator("#map canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] * 0.5, box["y"] + 2)
    assert ", round 3: " in page.locator("#cell").inner_text()
    page.wait_for_timeout(300)
    assert ", round 3: " in page.locator("#cell").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_in_light_and_dark(visit, tmp_path: Path, scheme: str):
    make(tmp_path / "a-run-with-a-name-of-some-length", clients=20)
    make(tmp_path / "two", config={"a-setting": "x" * 300})
    folders = tmp_path / "a-run-with-a-name-of-some-length", tmp_path / "two"
    size = {"width": 360, "height": 740}
    page = visit(written(tmp_path, *folders), viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(22, 23, 21)") == (scheme == "dark")
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != paper
    for plot in page.locator("#curves .u-over").all():
        assert plot.bounding_box()["width"] > 180


def test_a_thousand_clients_in_a_thousand_rounds(visit, tmp_path: Path):
    folder = tmp_path / "many"
    history = begun(folder, 1000)
    for number in range(1, 1001):
        add_round(history, number, 1000, 1000, [])
    page = visit(written(tmp_path, folder))
    page.locator("#curves .u-over").first.wait_for()
    assert page.locator("#s-nodes small").inner_text() == "1,000 of many"
    assert "median" in readout(page, "Training · loss")
    canvas = page.locator("#map canvas")
    box = canvas.bounding_box()
    canvas.hover(position={"x": box["width"] - 2, "y": box["height"] - 2})
    assert re.fullmatch(r"node-99\d, round (999|1000): .*", page.locator("#cell").inner_text())


def test_a_damaged_history_is_said_and_the_rest_shown(visit, tmp_path: Path):
    make(tmp_path / "runs" / "one")
    with (tmp_path / "runs" / "one" / "history.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{]\n{"round": "six"}\n')
        file.write(
            b'{"round": 6, "train": {"loss": NaN, "nodes": ["a"]}, "seconds": {"train": 3.0}}\n'
        )
        file.write(b'{"round": 7, "tr')
    said = "one: 3 damaged lines of history.jsonl left out."
    page = visit(written(tmp_path, tmp_path / "runs" / "one"))
    assert page.locator("#problem").inner_text() == said
    assert "train 3.0 s" in readout(page, "Seconds by phase")
    with serving(tmp_path / "runs", port=0) as address:
        live = visit(address)
        live.get_by_text(said).wait_for()
        assert "train 3.0 s" in readout(live, "Seconds by phase")


def test_a_run_of_an_older_version_is_shown(visit, tmp_path: Path):
    folder = tmp_path / "runs" / "old"
    folder.mkdir(parents=True)
    refused = '"refused": [{"node": "b", "phase": "train", "reason": "no reply within 9 seconds"}]'
    (folder / "history.jsonl").write_text(OLD.replace('"refused": []', refused))
    (folder / "settings.json").write_text("{half")
    with serving(tmp_path / "runs", port=0) as address:
        for page in (visit(written(tmp_path, folder)), visit(address)):
            page.locator("#now").get_by_text("recorded").wait_for()
            assert "all 1.5" in readout(page, "Evaluation · loss")
            assert "train: no reply within 9 seconds" in page.locator("#reasons").inner_text()


def test_the_page_follows_a_run_as_it_goes(visit, tmp_path: Path):
    with serving(tmp_path / "runs", port=0) as address:
        page = visit(address)
        page.get_by_text("No run yet").wait_for()
        history = make(tmp_path / "runs" / "one", rounds=2, finish=False)
        time.sleep(0.2)  # a phase that one can see
        history.notify(events.PhaseStarted(phase="evaluate", round=2, of=2, nodes=4, answered=0))
        page.get_by_text("round 2 of 2: evaluate").wait_for()
        add_round(history, 3, 4, 4, [])
        page.locator("#runs").get_by_text("3 of 2").wait_for()
        page.locator("#curves").get_by_text("round 3").first.wait_for()
        history.go_on_after(1)  # it was resumed from an earlier round
        page.locator("#runs").get_by_text("1 of 2").wait_for()
        history.notify(events.RunFinished(model="x", seconds=1.0))
        page.locator("#now").get_by_text("finished").wait_for()
        # A newer run is shown at once, unless someone has chosen.
        make(tmp_path / "runs" / "two")
        page.locator("#now").get_by_text("two").wait_for()
        page.get_by_label("one", exact=True).check()
        page.locator("#differences").get_by_text("num_rounds").wait_for()
        make(tmp_path / "runs" / "three")
        page.get_by_label("three", exact=True).wait_for()
        assert not page.get_by_label("three", exact=True).is_checked()
        assert page.locator("#now b").inner_text() == "two"


def test_the_page_says_when_the_dashboard_is_gone(visit, tmp_path: Path):
    make(tmp_path / "runs" / "one")
    with serving(tmp_path / "runs", port=0) as address:
        context = visit(address)
        context.locator("#now b").wait_for()
        context.route("**/api/**", lambda route: route.fulfill(status=200, body="not JSON"))
        context.get_by_text("The dashboard does not answer").wait_for()
        context.unroute("**/api/**")
        context.locator("#now b").wait_for()


def test_a_real_simulation_is_followed_in_a_browser(visit, start, tmp_path: Path):
    command = (
        "-m",
        "mlx_fed",
        "simulate",
        "tests.helpers.simulated:TASK",
        "--clients",
        40,
        "--rounds",
        400,
    )
    options = ("--runs", tmp_path / "runs", "--name", "live", "--workers", 0)
    run = start(*command, *options, "--dashboard", "--dashboard-port", 0)
    page = visit(run.line(r"Dashboard on (\S+)")[1])
    page.get_by_text("40 nodes").first.wait_for()
    before = json.loads((tmp_path / "runs" / "live" / "status.json").read_text())["round"]
    page.wait_for_function("before => runs.get('live').rounds.length > before + 5", arg=before)
    page.locator("#s-nodes small").get_by_text("40 of live").wait_for()
    page.close()  # it would complain that nobody answers
    run.interrupt()
    assert run.ends() == 130
