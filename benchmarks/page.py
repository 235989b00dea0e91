"""What it costs to watch a run: its history's writing, and a page that is open in a browser.

    python benchmarks/page.py            # writing
    python benchmarks/page.py --page     # and whether a large run's page stutters
    python benchmarks/page.py --browser  # and a simulation with and without an open page

The browser is chromium (``apt install chromium``; playwright is among the tests' requirements).
"""

from mlx_fed import events
import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import typer
from flwr.serverapp.strategy import FedAvg

from mlx_fed.runs import round_record
from mlx_fed.monitoring.dashboard import serving
from mlx_fed.runs.history import History

CLIENTS = 1000


def record(number: int) -> tuple[dict, list[dict]]:
    nodes = [f"node-{k}" for k in range(CLIENTS)]
    own = [{"num-examples": 600, "loss": 1.0 + k / 1000} for k in range(CLIENTS)]
    refused = [
        {"node": node, "phase": "train", "reason": "no reply within 60 seconds"}
        for node in nodes[::20]
    ]
    kept = {
        "round": number,
        "train": {"loss": 0.5, "nodes": nodes},
        "evaluate": {"loss": 0.5, "accuracy": 0.9, "nodes": nodes[::3]},
        "seconds": {"train": 1.0, "aggregate": 0.01, "evaluate": 0.5},
        "bytes": {"down": 10**9, "up": 10**9},
        "refused": refused,
    }
    return kept, own


def writing(rounds: int = 1000) -> None:
    """Milliseconds a round of a thousand clients, all that the history does included."""
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder))
        history.write_settings({"num_rounds": rounds})
        took = []
        for number in range(1, rounds + 1):
            kept, own = record(number)
            began = time.perf_counter()
            for phase in ("train", "evaluate"):
                now = (phase, number, rounds, CLIENTS)
                history.notify(events.PhaseStarted(*now, 0, *history.so_far(rounds - number + 1)))
            kept["spread"] = {"train": round_record.spread(own)}
            history.add_round(kept)
            took.append(1000 * (time.perf_counter() - began))
        size = (Path(folder) / "history.jsonl").stat().st_size
    print(
        f"history: {statistics.median(took):.2f} ms a round, {max(took):.2f} at most, "
        f"{size / rounds:.0f} bytes a round of {CLIENTS} clients"
    )


def stuttering(rounds: int = 1000) -> None:
    """How soon the page of a thousand clients and rounds is there, and how long it does not react.

    A task of the browser's above 50 ms is what people notice (the Long Tasks API).
    """
    from playwright.sync_api import sync_playwright

    observe = (
        "window.tasks = []; new PerformanceObserver((seen) => tasks.push(...seen.getEntries()"
        ".map((task) => Math.round(task.duration)))).observe({type: 'longtask', buffered: true})"
    )
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        history = History(Path(folder, "large"), (), {})
        history.folder.mkdir()
        history.write_settings({"num_rounds": rounds + 5})

        def add(number: int) -> None:
            kept, own = record(number)
            kept["spread"] = {
                "train": round_record.spread(own),
                "evaluate": round_record.spread(own[::3]),
            }
            now = {"phase": "train", "round": number, "of": rounds + 5, "nodes": CLIENTS}
            history.notify(events.PhaseStarted(**now, answered=0))
            history.add_round(kept)

        for number in range(1, rounds + 1):
            add(number)
        labels = [[client, [client % 7, 10, client % 3]] for client in range(CLIENTS)]
        found = {"of": CLIENTS, "classes": [0, 1, 2], "clients": labels}
        (history.folder / "labels.json").write_text(json.dumps(found))
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        with serving(Path(folder), port=0) as address:
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            page.add_init_script(observe)

            def said(what: str) -> None:
                page.wait_for_timeout(200)
                tasks = sorted(page.evaluate("tasks.splice(0)"), reverse=True)
                print(f"  {what}: {len(tasks)} tasks over 50 ms {tasks[:5] or ''}")

            page.goto(address)
            drawn = f"() => runs.get('large')?.rounds.length === {rounds} && performance.now()"
            first = page.wait_for_function(
                "() => document.querySelector('#curves .u-over') && performance.now()"
            )
            whole = page.wait_for_function(drawn)
            print(
                f"page of {rounds} rounds of {CLIENTS} clients: first curve after "
                f"{first.json_value():.0f} ms, the whole run after {whole.json_value():.0f} ms"
            )
            said("opening")
            for selector in ("#curves .u-over >> nth=0", "#map canvas", "#labels canvas"):
                target = page.locator(selector)
                target.scroll_into_view_if_needed()
                box = target.bounding_box()
                for step in range(60):
                    x = box["x"] + box["width"] * (step + 0.5) / 60
                    page.mouse.move(x, box["y"] + box["height"] * (step + 0.5) / 60)
            said("hovering")
            for step in range(40):
                page.mouse.wheel(0, 150 if step < 20 else -150)
                page.wait_for_timeout(16)
            said("scrolling")
            for number in range(rounds + 1, rounds + 6):
                add(number)
                page.wait_for_function(f"() => runs.get('large').rounds.length === {number}")
            said("five updates")
            page.get_by_text("Each node").click()
            said("the table of nodes")
            page.set_viewport_size({"width": 900, "height": 900})
            said("resizing")
        browser.close()


def chromium() -> str:
    return shutil.which("chromium") or sys.exit("There is no chromium: apt install chromium")


@contextmanager
def open_page(address: str, seconds: int):
    """A browser of its own that shows the page, for as long as the context lasts."""
    script = (
        "import sys, time\n"
        "from playwright.sync_api import sync_playwright\n"
        "with sync_playwright() as p:\n"
        "    b = p.chromium.launch(executable_path=sys.argv[1], args=['--no-sandbox'])\n"
        "    page = b.new_page(); page.goto(sys.argv[2]); print('open', flush=True)\n"
        "    time.sleep(float(sys.argv[3])); b.close()\n"
    )
    command = [sys.executable, "-c", script, chromium(), address, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()


def simulating(rounds: int, pairs: int) -> None:
    """Seconds of a simulation with a page open, beside the same without one, in turns."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from examples.mnist import task  # from the repository's root

    def seconds(runs: Path, name: str) -> float:
        strategy = FedAvg(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        result = fed.simulate(
            task, strategy, 50, rounds, runs=runs, name=name, keep=0, listeners=()
        )
        times = [sum(each["seconds"].values()) for each in result.rounds[5:]]
        return sum(times)

    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        seconds(runs, "warm")
        alone, watched = [], []
        for pair in range(pairs):
            alone.append(seconds(runs, f"alone-{pair}"))
            with serving(runs, port=0) as address, open_page(address, 600):
                watched.append(seconds(runs, f"watched-{pair}"))
    ratio = statistics.median(b / a for a, b in zip(alone, watched, strict=True))
    print(
        f"simulation of {rounds} rounds: {statistics.median(alone):.2f} s alone, "
        f"{statistics.median(watched):.2f} s with a page open: {100 * (ratio - 1):+.1f} %"
    )


def main(page: bool = False, browser: bool = False, rounds: int = 400, pairs: int = 3) -> None:
    writing()
    if page:
        stuttering()
    if browser:
        simulating(rounds, pairs)


if __name__ == "__main__":
    typer.run(main)
