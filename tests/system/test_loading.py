"""What takes long before training: a bar on a terminal, two lines in a file, else nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import numpy as np
import pytest
from mlx_fed import data
from mlx_fed.data import sources
from mlx_fed.system import loading
from mlx_fed.system.hub_progress import loading_with_tqdm
from mlx_fed.monitoring.json_lines import JsonLines
from mlx_fed.monitoring.loading_bars import show_loading
from mlx_fed.monitoring.node_terminal import NodeTerminal, node_listener_or_terminal
from mlx_fed.monitoring.server_terminal import ServerTerminal
from mlx_fed.simulation import worker_progress
from rich.console import Console

from ..helpers import hub, tiny_llama
from ..helpers.simulated import TASK, load, simulate

Told = list[events.Event]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All takes long enough to be told."""
    monkeypatch.setattr(loading, "_LONG", 0.0)
    monkeypatch.setattr(loading, "_PAUSE", 0.0)


def plain() -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, highlight=False, width=200), written


def read_files() -> None:
    with loading.loading("Reading [red]wards", 2, "files") as progress:
        for number in (1, 2):
            progress.update(number)


def test_what_is_over_in_a_moment_is_not_told():
    console, written = plain()
    with show_loading(console):
        read_files()
    assert written.getvalue() == ""


def test_a_file_gets_a_line_at_the_beginning_and_one_at_the_end(at_once):
    console, written = plain()
    with show_loading(console):
        read_files()
        read_files()
    assert written.getvalue().splitlines() == 2 * [
        "Reading [red]wards ...",
        "Reading [red]wards: done in 0 s",
    ]


def test_what_says_nothing_is_told_all_the_same(monkeypatch):
    monkeypatch.setattr(loading, "_LONG", 0.01)
    begun = threading.Event()
    with (
        loading.loading_listeners(lambda event: begun.set()),
        loading.loading("Waiting for a library"),
    ):
        assert begun.wait(30)


def test_a_terminal_has_a_bar_beside_that_of_the_run(at_once):
    written = io.StringIO()
    shown = ServerTerminal(Console(file=written, force_terminal=True, width=120))
    shown(events.PhaseStarted("train", 1, of=3, nodes=4))
    with loading.loading_listeners(shown), loading.loading("Downloading", unit="B") as progress:
        progress.update(1_500_000, 3_000_000, "B")
        lines = [(task.description, task.total) for task in shown.bars.progress.tasks]
        assert lines == [
            ("round 1/3  train  0 of 4 nodes", 3),
            ("Downloading  1.5 MB of 3.0 MB", 3_000_000),
        ]
    assert len(shown.bars.progress.tasks) == 1
    shown.close()
    assert written.getvalue().count("\x1b[?25l") == written.getvalue().count("\x1b[?25h")


def test_a_node_shows_what_it_is_at():
    shown = NodeTerminal(Console(file=io.StringIO(), force_terminal=True, width=120))
    shown(events.ServerJoined("127.0.0.1:8080"))
    shown(events.MessageReceived("train", 3))
    assert shown.bars.progress.tasks[0].description == "round 3 train"
    shown(events.MessageAnswered("train", 3, 1.0))
    assert shown.bars.progress.tasks[0].description == "waiting for the server"
    shown.close()


def test_whom_a_node_was_told_to_tell_is_told_of_loading_too(at_once):
    told: Told = []
    with node_listener_or_terminal(told.append):
        read_files()
    assert {event.name for event in told} == {"loading", "loaded"}


def test_programs_are_not_told(at_once):
    written = io.StringIO()
    with loading.loading_listeners(JsonLines(written)):
        read_files()
    assert written.getvalue() == ""


# -- what is told of -----------------------------------------------------------------------


def test_decoding_is_told_and_gives_the_same_in_parts(at_once, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("MLX_FED_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_DECODE_BATCH", 2000)
    source = sources.Source("digits", "train")
    told: Told = []
    with loading.loading_listeners(told.append):
        images = source.read("image", np.arange(5000))
    decoding = [e for e in told if isinstance(e, events.LoadProgress) and "'image'" in e.what]
    assert [e.done for e in decoding if e.of == 5000 and e.done] == [2000, 4000, 5000]
    assert decoding[0].what == "Decoding 'image' of 'digits'"
    whole = np.asarray(source.dataset.with_format("numpy")["image"][:], np.uint8)
    assert images.dtype == whole.dtype
    assert np.array_equal(images, whole)


@pytest.mark.parametrize("at_a_time", [2, 3, 100])
def test_images_of_several_sizes_stay_apart(monkeypatch, tmp_path: Path, at_a_time: int):
    from datasets import Dataset

    monkeypatch.setenv("MLX_FED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_DECODE_BATCH", at_a_time)
    sizes = [(4, 4), (4, 4), (4, 4), (2, 3), (4, 4)]
    rows = [np.full(size, k).tolist() for k, size in enumerate(sizes)]
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"image": rows}).to_parquet(tmp_path / "data" / "train.parquet")
    examples = data.load_test_split(str(tmp_path / "data"), "train")
    (images,) = data.columns(examples, "image")
    assert [image.shape for image in images] == sizes
    assert [image[0][0] for image in images] == [0, 1, 2, 3, 4]


def test_bars_of_hugging_face_are_told_and_not_drawn(at_once, capfd):
    from huggingface_hub.utils import tqdm

    told: Told = []
    with (
        loading.loading_listeners(told.append),
        loading_with_tqdm("Downloading", tqdm),
        tqdm(total=10_000, unit="B", disable=None) as bar,
    ):
        bar.update(2_500)
        bar.refresh()
    assert events.LoadProgress("Downloading", 2_500, 10_000, "B") in told
    with loading_with_tqdm("Downloading", tqdm), tqdm(total=10, disable=False) as bar:
        bar.update(5)
    assert capfd.readouterr() == ("", "")
    with tqdm(total=10, disable=False) as bar:
        bar.update(5)
    assert "5/10" in capfd.readouterr().err


def slow_wards(partition_id: int, num_partitions: int | None) -> fed.Data:
    with loading.loading("Reading wards", 2, "wards") as progress:
        time.sleep(1.1 * loading._LONG)
        progress.update(2)
    return load(partition_id, num_partitions)


@pytest.mark.slow
def test_what_workers_load_is_told_of_one_at_a_time(tmp_path: Path):
    told: Told = []
    task = replace(TASK, data=slow_wards)
    listeners = (told.append,)
    simulate(None, tmp_path, task, 2, num_rounds=1, workers=2, listeners=listeners)
    ward = [event.name for event in told if getattr(event, "what", "") == "Reading wards"]
    assert ward[0] == "loading"
    assert ward.count("loaded") == [event for event, _ in groupby(ward)].count("loaded") > 0


def test_the_first_worker_speaks_for_all(tmp_path: Path):
    told: Told = []
    progress = events.LoadProgress("Reading wards", 1, 2, "wards")
    end = events.LoadFinished("Reading wards", 1.0)
    with worker_progress.received(tmp_path, [told.append]):
        worker_progress.sender(tmp_path)(progress)
        other = (
            "from pathlib import Path; from mlx_fed.events import LoadProgress;"
            "from mlx_fed.simulation import worker_progress;"
            f"worker_progress.sender(Path({str(tmp_path)!r}))({progress!r})"
        )
        subprocess.run([sys.executable, "-c", other], check=True)
        worker_progress.sender(tmp_path)(end)
    assert told == [progress, end]


def test_a_simulation_whose_folder_has_too_long_a_name_goes_without(tmp_path: Path):
    with worker_progress.received(tmp_path / ("x" * 200), []):
        worker_progress.sender(tmp_path / ("x" * 200))(
            events.LoadProgress("Reading wards", 1, 2, "wards")
        )


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_told_where_it_is_loaded(start, tmp_path: Path):
    from datasets import Dataset

    (tmp_path / "hub").mkdir()
    columns = {"image": [np.zeros((28, 28), np.uint8).tolist()] * 30, "label": [*range(10)] * 3}
    Dataset.from_dict(columns).to_parquet(tmp_path / "hub" / "train.parquet")
    with hub.serving(tmp_path / "hub", 1.5 * loading._LONG) as address:
        task = ("examples.mnist:task", "--num-partitions", 3, "-c", "dataset=org/it")
        shown = start(
            *("-m", "mlx_fed", "partitions", *task),
            HF_ENDPOINT=address,
            HF_HOME=str(tmp_path / "home"),
        )
        assert shown.ends() == 0, shown.text
    assert "Loading the dataset 'org/it' ...\n" in shown.text
    assert "Loading the dataset 'org/it': done in" in shown.text
    assert "%|" not in shown.text


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--json",), ("--quiet",)])
def test_a_base_model_of_the_hub_is_told_where_it_is_downloaded(start, tmp_path: Path, options):
    pytest.importorskip("mlx_lm")
    tiny_llama.write_model(tmp_path / "hub")
    tiny_llama.write_texts(tmp_path / "texts" / "anna", tiny_llama.lines("anna", 8))
    with hub.serving(tmp_path / "hub", 1.5 * loading._LONG) as address:
        run = start(
            *("-m", "mlx_fed", "lora", "simulate", "--model", "org/it", "--iters", 1),
            *("--data", tmp_path / "texts", "--num-layers", -1, "--rounds", 1),
            *("--runs", tmp_path / "runs", *options),
            HF_ENDPOINT=address,
            HF_HOME=str(tmp_path / "home"),
        )
        assert run.ends() == 0, run.text
    if options == ("--quiet",):
        assert run.text == ""
    elif options == ("--json",):
        assert "note" in {json.loads(line)["event"] for line in run.text.splitlines()}
    else:
        assert run.text.startswith("Downloading the model org/it ...\n")
        assert "Downloading the tokenizer of org/it: done in" in run.text
        assert "Downloading the model org/it: done in" in run.text
        assert "%|" not in run.text
