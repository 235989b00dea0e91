"""Run folders: made without a run, and read."""

from __future__ import annotations

import json
from filecmp import cmp
from pathlib import Path

from typer.testing import CliRunner

from mlx_fed import events
from mlx_fed.cli.main import app
from mlx_fed.runs.history import History


def read_history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def figures(rounds: list[dict]) -> list[dict]:
    """What does not differ from run to run: all but the time it took."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "time")} for record in rounds]


def checkpoints(folder: Path) -> dict[int, Path]:
    return {int(p.name[:5]): p for p in (folder / "checkpoints").iterdir()}


OLD = (
    '{"round": 1, "train": {"loss": 2.0, "nodes": ["a"]}, "evaluate": {"loss": 1.5, "nodes": '
    '["a"]}, "seconds": {"train": 1.0}, "bytes": {"down": 1, "up": 2}, "refused": []}\n'
)
"""A line of the first version."""


def make_run(folder: Path, rounds: int = 2, **settings: object) -> Path:
    folder.mkdir(parents=True)
    history = History(folder)
    history.write_settings({"num_rounds": rounds, "strategy": {"name": "FedAvg"}, **settings})
    for number in range(1, rounds + 1):
        train = {"loss": 1 / number, "nodes": ["a", "b"]}
        history.add_round(
            {"round": number, "train": train, "seconds": {"train": 0.5}, "refused": []}
        )
    history.notify(events.RunFinished(model=folder, seconds=1.0))
    return folder


def command_output(*arguments: object, code: int = 0, columns: int = 200) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": str(columns)})
    assert result.exit_code == code, result.output
    return result.output


def assert_same_end(one: Path, other: Path) -> None:
    assert figures(read_history(one)) == figures(read_history(other))
    for name in ("model.safetensors", "best.safetensors"):
        assert cmp(one / name, other / name, shallow=False), name
