"""What it costs to watch a run: its history's writing, and a page that is open in a browser.

    python benchmarks/page.py            # writing
    python benchmarks/page.py --browser  # and a simulation with and without an open page

The browser is chromium (``apt install chromium``; playwright is among the tests' requirements).
"""

import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

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

from mlx_fed import records
from mlx_fed.dashboard import serving
from mlx_fed.history import History

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
                history.notify("phase", phase=phase, round=number, of=rounds, nodes=CLIENTS)
            kept["spread"] = {"train": records.spread(own)}
            history.add_round(kept)
            took.append(1000 * (time.perf_counter() - began))
        size = (Path(folder) / "history.jsonl").stat().st_size
    print(
        f"history: {statistics.median(took):.2f} ms a round, {max(took):.2f} at most, "
        f"{size / rounds:.0f} bytes a round of {CLIENTS} clients"
    )


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
    browser = shutil.which("chromium") or sys.exit("There is no chromium: apt install chromium")
    command = [sys.executable, "-c", script, browser, address, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        process.stdout.readline()
        yield
    finally:
        process.terminate()
        process.wait()


def simulating(rounds: int, pairs: int) -> None:
    """Seconds of a simulation with a page open, beside the same without one, in turns."""
    from examples.mnist import task

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


def main(browser: bool = False, rounds: int = 400, pairs: int = 3) -> None:
    writing()
    if browser:
        simulating(rounds, pairs)


if __name__ == "__main__":
    typer.run(main)
