"""What a run looks like, in a terminal and in a file."""

from __future__ import annotations

import io
import json

from rich.console import Console

from mlx_fed.progress import JsonLines, ServerProgress, seconds_text, size_text


def record(number: int, loss: float, accuracy: float) -> dict:
    return {
        "round": number,
        "train": {"loss": 2 * loss, "nodes": ["node-0"]},
        "evaluate": {"loss": loss, "accuracy": accuracy},
        "seconds": {"train": 0.25, "evaluate": 0.25},
        "bytes": {"down": 3_000_000, "up": 1_000_000},
    }


def show(progress: ServerProgress, rounds: int) -> None:
    progress("serving", {"address": "127.0.0.1:8080", "secure": False})
    progress("waiting", {"nodes": 0, "needed": 1})
    progress("joined", {"node": "[red]node-0", "nodes": 1})
    for number in range(1, rounds + 1):
        for phase in ("train", "evaluate"):
            progress("phase", {"phase": phase, "round": number, "of": rounds, "nodes": 1})
            progress("reply", {"node": "[red]node-0", "phase": phase})
        progress("round", record(number, 1 / number, 1 - 0.5 / number))
    progress("finished", {"seconds": 12.34, "model": "runs/one/model.safetensors"})


def test_a_file_gets_plain_lines_and_a_summary():
    written = io.StringIO()
    show(ServerProgress(Console(file=written, highlight=False, width=60)), rounds=10)
    lines = written.getvalue().splitlines()
    assert lines[:4] == [
        "Server ready on 127.0.0.1:8080",
        "Waiting for nodes: 0 of 1",
        "[red]node-0 joined (1 in all)",
        "round 1    train loss 2.0000   loss 1.0000   accuracy 0.5000   0.50 s",
    ]
    assert lines[-3:] == [
        "round 10   train loss 0.2000   loss 0.1000   accuracy 0.9500   0.50 s",
        "In 10 rounds: train loss 2.0000 -> 0.2000, loss 1.0000 -> 0.1000, "
        "accuracy 0.5000 -> 0.9500",
        "Finished in 12.3 s. The model: runs/one/model.safetensors",
    ]
    assert len(lines) == 15


def test_of_many_that_are_left_out_a_few_are_named_and_the_others_counted():
    written = io.StringIO()
    progress = ServerProgress(Console(file=written, highlight=False))
    for phase, failures in (("train", 12), ("evaluate", 10)):
        progress("phase", {"phase": phase, "round": 1, "of": 1, "nodes": 100})
        for number in range(failures):
            progress("failed", {"node": f"node-{number}", "phase": phase, "reason": "no answer"})
    progress("round", record(1, 1, 1))
    lines = written.getvalue().splitlines()
    assert lines[:10] == [f"node-{k} left out of train: no answer" for k in range(10)]
    assert lines[10] == "2 more left out of train: history.jsonl says why"
    assert lines[11:21] == [f"node-{k} left out of evaluate: no answer" for k in range(10)]
    assert lines[21].startswith("round 1 ")


def test_one_round_has_nothing_to_compare():
    written = io.StringIO()
    show(ServerProgress(Console(file=written, highlight=False)), rounds=1)
    assert "In 1 rounds" not in written.getvalue()


def test_a_terminal_has_a_live_line_which_is_gone_in_the_end():
    written = io.StringIO()
    show(ServerProgress(Console(file=written, force_terminal=True, width=100)), rounds=2)
    shown = written.getvalue()
    assert "Waiting for nodes: 0 of 1" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is back
    assert "The model: runs/one/model.safetensors" in shown.split("\x1b[?25h")[1]


def test_the_live_line_has_bytes_and_the_time_left():
    progress = ServerProgress(Console(file=io.StringIO(), force_terminal=True, width=120))
    for number in (1, 2, 3):
        progress("phase", {"phase": "train", "round": number, "of": 4, "nodes": 8})
        progress("replies", {"count": 3})
        shown = progress.bar.tasks[0].description
        progress("round", record(number, 1, 1))
    progress.close()
    assert shown == "round 3/4  train  3 of 8 nodes  8 MB  about 1 s left"


def test_programs_get_an_object_a_line():
    written = io.StringIO()
    show(JsonLines(written), rounds=2)
    told = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [each["event"] for each in told] == [
        *("serving", "waiting", "joined"),
        *("phase", "phase", "round", "phase", "phase", "round", "finished"),
    ]
    assert told[5]["train"]["loss"] == 2.0


def test_sizes_and_times_are_written_as_people_do():
    assert [size_text(size) for size in (0, 999, 1234, 56_700_000, 1e12)] == [
        *("0 B", "999 B", "1.23 kB", "56.7 MB", "1 TB"),
    ]
    assert [seconds_text(seconds) for seconds in (0.4, 59.6, 125, 7260)] == [
        *("0 s", "1 min 0 s", "2 min 5 s", "2 h 1 min"),
    ]
