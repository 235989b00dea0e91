"""The ``mlx-fed`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .arguments import (
    errors_as_messages,
    find_strategy,
    find_task,
    find_test,
    parse_settings,
)
from .audit import audit
from .lora import lora
from .nodes import certs, nodes
from .options import (
    Joining,
    Leading,
    Listening,
    Rounds,
    Settings,
    Showing,
    StrategyName,
    StrategyOptions,
    TaskName,
    TestName,
    Token,
    Watching,
    with_options,
)
from .runs import report, runs_app

app = typer.Typer(
    help="Federated learning for MLX models, on Flower's engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(lora, name="lora")
app.add_typer(runs_app, name="runs")
app.command()(report)
app.add_typer(nodes, name="nodes")
app.add_typer(certs, name="certs")
app.add_typer(audit, name="audit")


@app.command()
@with_options
def serve(
    *,
    task: TaskName,
    rounds: Rounds = None,
    strategy: StrategyName = "FedAvg",
    strategy_option: StrategyOptions = None,
    min_nodes: Annotated[int, typer.Option(min=1, help="Nodes that a round needs.")] = 2,
    test: TestName = None,
    seed: int = 0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Aggregate on the GPU.")] = False,
    config: Settings = None,
    listening: Listening,
    leading: Leading,
    shown: Watching,
) -> None:
    """Serve a federation: wait for nodes, train, save the model."""
    with errors_as_messages():
        settings = parse_settings(config)
        from ..fleet.server import serve
        from ..monitoring.listeners import run_listeners

        found = find_task(task)
        chosen = find_strategy(strategy, min_nodes, parse_settings(strategy_option, "-s"))
        with run_listeners(leading.runs, **vars(shown)) as listeners:
            held_out = find_test(test, settings) if test else None
            serve(
                found,
                chosen,
                rounds,
                **vars(listening),
                **vars(leading),
                listeners=listeners,
                join_command=f"mlx-fed join {task}",
                seed=seed,
                min_nodes=min_nodes,
                device="gpu" if gpu else "cpu",
                config=settings,
                test=held_out,
            )


@app.command()
@with_options
def join(
    *,
    task: TaskName,
    token: Token = None,
    node_id: Annotated[
        int | None,
        typer.Option(
            min=0, help="Which part of the data is held here.", show_default="the token's, or 0"
        ),
    ] = None,
    num_partitions: Annotated[
        int | None, typer.Option(min=1, help="Of how many, if the data is partitioned.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="How the server calls this node.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    config: Settings = None,
    joining: Joining,
    shown: Showing,
) -> None:
    """Join a federation with this machine's data, until the run is over."""
    with errors_as_messages():
        from ..fleet.node import join
        from ..monitoring.listeners import node_listener

        join(
            find_task(task),
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            name=name,
            device="gpu" if gpu else "cpu",
            config=parse_settings(config),
            notify=node_listener(**vars(shown)),
            **vars(joining),
        )


@app.command()
def partitions(
    task: TaskName,
    num_partitions: Annotated[int, typer.Option(min=1, help="Clients that share the data.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Draw a picture too: a .png, .svg or .html file."),
    ] = None,
    config: Settings = None,
) -> None:
    """Show which labels each client would hold."""
    with errors_as_messages():
        from rich.console import Console

        from ..monitoring.label_chart import check_chart_path, draw_chart
        from ..monitoring.label_counts import count_labels, label_table
        from ..monitoring.loading_bars import show_loading
        from ..task import make_task
        from ..task_settings import check_config

        if output:
            check_chart_path(output)
        settings = parse_settings(config)
        found = find_task(task)
        made = make_task(found, settings)
        with show_loading(Console(stderr=True)):
            labels = count_labels(made, num_partitions)
        check_config(settings, made, [found])
        console = Console()
        console.print(label_table(labels, console.width))
        if output:
            given = ", ".join(f"{key}={value}" for key, value in settings.items())
            draw_chart(
                labels,
                output,
                f"{task}, {num_partitions} clients" + (f"\n{given}" if given else ""),
            )
            typer.echo(f"Drawn: {output}")


@app.command()
@with_options
def simulate(
    *,
    task: TaskName,
    clients: Annotated[int, typer.Option(min=1, help="Clients that there are.")] = 100,
    rounds: Rounds = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The share of clients that train in a round.",
            show_default="the strategy's",
        ),
    ] = None,
    fraction_evaluate: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The share of clients that evaluate after it.",
            show_default="the strategy's",
        ),
    ] = None,
    strategy: StrategyName = "FedAvg",
    strategy_option: StrategyOptions = None,
    test: TestName = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes; 0 is none but this.", show_default="one a core"),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="Clients that train at once.", show_default="what fits"),
    ] = None,
    batched: Annotated[
        bool, typer.Option(help="Train clients many at once where that is possible.")
    ] = True,
    failure_rate: Annotated[
        float, typer.Option(min=0, max=1, help="The share of messages that go unanswered.")
    ] = 0.0,
    mean_delay: Annotated[
        float, typer.Option(min=0, help="Seconds that clients take beyond training, on average.")
    ] = 0.0,
    hostile: Annotated[
        float, typer.Option(min=0, max=1, help="The share of clients that attack.")
    ] = 0.0,
    attack: Annotated[str, typer.Option(help="sign-flip, scale or label-flip.")] = "sign-flip",
    scale: Annotated[
        float | None,
        typer.Option(help="The attack's factor.", show_default="1 of sign-flip, 10 of scale"),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=2, help="Labels that there are, for label-flip.")
    ] = None,
    seed: int = 0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    config: Settings = None,
    leading: Leading,
    shown: Watching,
) -> None:
    """Simulate a whole federation on this machine."""
    with errors_as_messages():
        settings = parse_settings(config)
        from ..monitoring.listeners import run_listeners
        from ..simulation.faults import Faults
        from ..simulation.simulate import simulate

        fractions = {"fraction-train": fraction, "fraction-evaluate": fraction_evaluate}
        options = {key: share for key, share in fractions.items() if share is not None}
        options |= parse_settings(strategy_option, "-s")
        found = find_task(task)
        chosen = find_strategy(strategy, 1, options)
        with run_listeners(leading.runs, **vars(shown)) as listeners:
            held_out = find_test(test, settings) if test else None
            simulate(
                found,
                chosen,
                clients,
                rounds,
                listeners=listeners,
                batched=batched,
                chunk_size=chunk_size,
                workers=workers,
                faults=Faults(
                    failure_rate=failure_rate,
                    mean_delay=mean_delay,
                    hostile=hostile,
                    attack=attack,
                    scale=scale,
                    num_classes=num_classes,
                ),
                **vars(leading),
                seed=seed,
                device="gpu" if gpu else "cpu",
                config=settings,
                test=held_out,
            )


@app.command("dashboard")
def dashboard_(
    runs: Annotated[Path, typer.Argument(help="The folder with the runs.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow addresses beyond this machine.")
    ] = False,
) -> None:
    """Show the runs in a folder in a browser, those that go on as they go."""
    with errors_as_messages():
        from ..monitoring.dashboard import serve_until_interrupted

        serve_until_interrupted(runs, host, port, insecure)


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The app's name: a Python module's.")],
) -> None:
    """Write a new app to start from: a task that trains, with a place for your own."""
    with errors_as_messages():
        from .new_app import write_app

        folder = write_app(name, Path.cwd())
        typer.echo(f"Wrote {folder}/. Read its README.md, or run at once, in three terminals:")
        typer.echo(f"  cd {name} && mlx-fed serve {name}:task")
        typer.echo(f"  cd {name} && mlx-fed join {name}:task --node-id 0")
        typer.echo(f"  cd {name} && mlx-fed join {name}:task --node-id 1")


@app.callback(invoke_without_command=True)
def version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mlx-fed {__version__}")
        raise typer.Exit


def main() -> None:
    """The ``mlx-fed`` command."""
    app()
