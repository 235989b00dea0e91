"""Runs as one HTML file."""

from __future__ import annotations

import json
import re
from pathlib import Path

from mlx_fed.runs.history import History
from mlx_fed.monitoring.page import policy

from ..helpers.run_folders import OLD, command_output, make_run

NASTY = "</script><script>alert(1)</script><!--"


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_a_report_is_one_file_without_anything_from_elsewhere(tmp_path: Path):
    make_run(tmp_path / "one", config={"lr": 0.1})
    make_run(tmp_path / "two", config={"lr": 0.2})
    output = tmp_path / "report.html"
    command_output("report", "one", "two", "-o", output, "--runs", tmp_path)
    html = output.read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=.https?:", html)
    assert f'content="{policy()}"' in html
    one, two = data_of(html)["runs"]
    assert (one["name"], two["settings"]["config"]["lr"]) == ("one", 0.2)
    assert [json.loads(line)["round"] for line in one["lines"]] == [1, 2]
    assert str(tmp_path) not in html  # a colleague need not know where it lay


def test_what_nodes_send_cannot_end_the_data(tmp_path: Path):
    (tmp_path / "run").mkdir()
    history = History(tmp_path / "run")
    history.write_settings({"name": NASTY, "wait": float("inf")})
    refused = [{"node": NASTY, "phase": "train", "reason": NASTY}]
    history.add_round({"round": 1, "train": {"loss": float("nan")}, "refused": refused})
    command_output("report", "run", "-o", tmp_path / "x.html", "--runs", tmp_path)
    html = (tmp_path / "x.html").read_text()
    assert "alert(1)</script>" not in html
    (run,) = data_of(html)["runs"]
    assert run["settings"] == {"name": NASTY, "wait": None}
    assert json.loads(run["lines"][0])["refused"] == refused
    assert json.loads(run["lines"][0])["train"] == {"loss": None}


def test_a_report_of_a_damaged_run_and_of_an_old_one(tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "history.jsonl").write_text(OLD + '{"round": 2, "tr')
    command_output("report", "old", "-o", tmp_path / "x.html", "--runs", tmp_path)
    (run,) = data_of((tmp_path / "x.html").read_text())["runs"]
    assert (run["damaged"], len(run["lines"])) == (1, 1)


def test_a_report_as_csv(tmp_path: Path):
    make_run(tmp_path / "one")
    assert command_output("report", "one", "--csv", "--runs", tmp_path).startswith(
        "run,round,train/loss"
    )


def test_a_report_that_cannot_be_written_or_has_no_run(tmp_path: Path):
    make_run(tmp_path / "one")
    output = tmp_path / "no" / "x.html"
    assert "Cannot write" in command_output(
        "report", "one", "-o", output, "--runs", tmp_path, code=1
    )
    assert "There is no run 'two'" in command_output("report", "two", "--runs", tmp_path, code=1)
