"""The options that commands share."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from mlx_fed.cli.main import app
from mlx_fed.cli.options import (
    JoinOptions,
    RunOptions,
    ServerOptions,
    OptionGroup,
    MonitorOptions,
    to_arguments,
    with_options,
)
from typer.testing import CliRunner

import client
import run
import server

from ..helpers.ids import stable_id
from ..conftest import free_port


def command(of: Any) -> click.Command:
    if isinstance(of, str):
        found: Any = typer.main.get_command(app)
        for name in of.split():
            found = found.commands[name]
        return found
    alone = typer.Typer()
    alone.command()(of)
    return typer.main.get_command(alone)


@pytest.mark.parametrize(
    ("of", "groups"),
    [
        ("serve", (ServerOptions, RunOptions, MonitorOptions)),
        ("lora serve", (ServerOptions, RunOptions, MonitorOptions)),
        (server.main, (ServerOptions, RunOptions, MonitorOptions)),
        ("simulate", (RunOptions, MonitorOptions)),
        ("lora simulate", (RunOptions, MonitorOptions)),
        (run.main, (RunOptions, MonitorOptions)),
        ("join", (JoinOptions,)),
        ("lora join", (JoinOptions,)),
        (client.main, (JoinOptions,)),
    ],
    ids=stable_id,
)
def test_commands_of_a_kind_have_the_same_options(of: Any, groups: tuple[type[OptionGroup], ...]):
    has = {parameter.name: parameter for parameter in command(of).params}
    for group in groups:
        for field in fields(group):  # type: ignore[arg-type]
            assert field.name in has
            assert has[field.name].default == field.default or field.default is None


def test_a_command_gets_options_of_a_kind_as_one():
    got: list[Any] = []

    @with_options
    def train(*, what: str = "x", run: RunOptions, monitor: MonitorOptions) -> None:
        got.extend([what, run, monitor])

    alone = typer.Typer()
    alone.command()(train)
    given = [
        "--keep",
        "7",
        "--resume",
        "a",
        "--track",
        "one",
        "--track",
        "two",
        "-q",
        "--what",
        "y",
    ]
    assert CliRunner().invoke(alone, given).exit_code == 0
    assert got == [
        "y",
        RunOptions(keep=7, resume="a"),
        MonitorOptions(track=["one", "two"], quiet=True),
    ]


def test_options_are_handed_on_to_arguments():
    assert to_arguments(RunOptions()) == []
    options = RunOptions(keep=0, runs=Path("elsewhere"), max_update_norm=2.5)
    assert to_arguments(options) == ["--max-update-norm=2.5", "--runs=elsewhere", "--keep=0"]
    monitor = MonitorOptions(dashboard=True, track=["a", "b"])
    assert to_arguments(monitor) == ["--dashboard", "--track=a", "--track=b"]


@pytest.mark.slow
def test_run_hands_its_options_on_to_the_server(start, tmp_path: Path):
    options = (
        "--name",
        "first",
        "--min-replies",
        2,
        "--json",
        "--dashboard",
        "--dashboard-port",
        0,
    )
    started = start(
        *("run.py", "--port", free_port(), "--rounds", 1, "--runs", tmp_path / "runs", *options)
    )
    assert started.ends(100) == 0, started.text
    told = [json.loads(line) for line in started.text.splitlines()]
    assert {"serving", "dashboard", "round", "finished"} <= {each["event"] for each in told}
    settings = json.loads((tmp_path / "runs" / "first" / "settings.json").read_text())
    assert settings["min_replies"] == 2
