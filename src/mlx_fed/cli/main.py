"""``mlx-fed``: the command and its subcommands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from .application import App
from .arguments import find_strategy, find_task, load_test, parse_settings
from .audit_commands import audit_app
from .check import check
from .lora import lora_app
from .nodes import certs_app, nodes_app
from .option_kinds import count, option, share, tcp_port
from .options import (
    JoinOptions,
    MonitorOptions,
    NodeId,
    NumPartitions,
    OutputOptions,
    Rounds,
    RunOptions,
    SeedOption,
    ServerOptions,
    Settings,
    StrategyName,
    StrategyOptions,
    TaskName,
    TestName,
    TokenArgument,
    with_options,
)
from .privacy_options import PrivacyOptions
from .runs import report, runs_app
from .service_commands import service_app

app = App("Federated learning for MLX models, on Flower's engine.")
_FAULTS = "Simulated faults"


@app.command()
@with_options
def simulate(
    *,
    task: TaskName,
    clients: Annotated[int, count("Number of clients.")] = 100,
    rounds: Rounds = None,
    fraction: Annotated[
        float | None, share("Share of the clients that train in a round.", "the strategy's")
    ] = None,
    fraction_evaluate: Annotated[
        float | None, share("Share of the clients that evaluate after a round.", "the strategy's")
    ] = None,
    strategy: StrategyName = "FedAvg",
    strategy_option: StrategyOptions = None,
    test: TestName = None,
    workers: Annotated[
        int | None, count("Worker processes; 0: train in this process.", "one a core", min=0)
    ] = None,
    chunk_size: Annotated[
        int | None, count("Clients that one process trains at once.", "by memory")
    ] = None,
    batched: Annotated[
        bool, typer.Option(help="Train several clients at once where the model allows it.")
    ] = True,
    failure_rate: Annotated[
        float, share("Share of the messages that get no reply.", panel=_FAULTS)
    ] = 0.0,
    mean_delay: Annotated[
        float,
        option(
            "SECONDS", "Mean delay of a client's reply, in simulated time.", min=0, panel=_FAULTS
        ),
    ] = 0.0,
    hostile: Annotated[float, share("Share of the clients that attack.", panel=_FAULTS)] = 0.0,
    attack: Annotated[
        str, option("NAME", "The attack: sign-flip, scale or label-flip.", panel=_FAULTS)
    ] = "sign-flip",
    scale: Annotated[
        float | None,
        option("FACTOR", "The attack's factor.", "1 for sign-flip, 10 for scale", panel=_FAULTS),
    ] = None,
    num_classes: Annotated[
        int | None, count("Number of labels, for label-flip.", min=2, panel=_FAULTS)
    ] = None,
    seed: SeedOption = 0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    config: Settings = None,
    run: RunOptions,
    privacy: PrivacyOptions,
    monitor: MonitorOptions,
) -> None:
    """Simulate a federation on this machine."""
    settings = parse_settings(config)
    from ..monitoring.listeners import run_listeners
    from ..simulation.faults import Faults
    from ..simulation.simulate import simulate

    fractions = {"fraction-train": fraction, "fraction-evaluate": fraction_evaluate}
    options = {key: share for key, share in fractions.items() if share is not None}
    options |= parse_settings(strategy_option, "-s")
    task_source = find_task(task)
    flower_strategy = privacy.wrap(find_strategy(strategy, 1, options), rounds)
    with run_listeners(run.runs, **vars(monitor)) as listeners:
        simulate(
            task_source,
            flower_strategy,
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
            **run.to_settings(),
            seed=seed,
            device="gpu" if gpu else "cpu",
            config=settings,
            test=load_test(test, settings),
        )


@app.command()
@with_options
def serve(
    *,
    task: TaskName,
    rounds: Rounds = None,
    strategy: StrategyName = "FedAvg",
    strategy_option: StrategyOptions = None,
    min_nodes: Annotated[int, count("Nodes that a round needs.")] = 2,
    test: TestName = None,
    seed: SeedOption = 0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Aggregate on the GPU.")] = False,
    config: Settings = None,
    server: ServerOptions,
    run: RunOptions,
    privacy: PrivacyOptions,
    monitor: MonitorOptions,
) -> None:
    """Serve a federation: wait for nodes, train, save the model."""
    settings = parse_settings(config)
    from ..fleet.server import serve
    from ..monitoring.listeners import run_listeners

    task_source = find_task(task)
    flower_strategy = find_strategy(strategy, min_nodes, parse_settings(strategy_option, "-s"))
    flower_strategy = privacy.wrap(flower_strategy, rounds)
    with run_listeners(run.runs, **vars(monitor)) as listeners:
        serve(
            task_source,
            flower_strategy,
            rounds,
            **vars(server),
            **run.to_settings(),
            listeners=listeners,
            join_command=f"mlx-fed join {task}",
            seed=seed,
            min_nodes=min_nodes,
            device="gpu" if gpu else "cpu",
            config=settings,
            test=load_test(test, settings),
        )


@app.command()
@with_options
def join(
    *,
    task: TaskName,
    token: TokenArgument = None,
    node_id: NodeId = None,
    num_partitions: NumPartitions = None,
    name: Annotated[str | None, option("NAME", "The node's name on the server.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    config: Settings = None,
    steps_per_report: Annotated[
        int | None, count("Report on a training each N steps.", "each second")
    ] = None,
    connection: JoinOptions,
    output: OutputOptions,
) -> None:
    """Join a federation, and train on this machine's data."""
    from ..fleet.node import join
    from ..monitoring.listeners import node_listener

    with node_listener(**vars(output)) as listener:
        join(
            find_task(task),
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            name=name,
            device="gpu" if gpu else "cpu",
            config=parse_settings(config),
            steps_per_report=steps_per_report,
            listener=listener,
            **vars(connection),
        )


app.add_typer(lora_app, name="lora")
app.add_typer(runs_app, name="runs")
app.command()(report)
app.command()(check)


@app.command("dashboard")
def serve_dashboard(
    runs: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="The folder of runs.")] = Path(
        "runs"
    ),
    host: Annotated[str, option("HOST", "The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, tcp_port("The port; 0: any free port.")] = 8000,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow addresses beyond this machine.")
    ] = False,
) -> None:
    """Show a folder of runs in a browser."""
    from ..monitoring.dashboard import serve_until_interrupted

    serve_until_interrupted(runs, host, port, insecure)


@app.command()
def partitions(
    task: TaskName,
    num_partitions: Annotated[int, count("Number of clients that share the data.")],
    output: Annotated[
        Path | None,
        option("FILE", "Draw a chart, too: a .png, .svg or .html file.", True, "--output", "-o"),
    ] = None,
    config: Settings = None,
) -> None:
    """Show the labels of each client's data."""
    from rich.console import Console

    from ..monitoring.label_chart import check_chart_path, draw_chart
    from ..monitoring.label_counts import count_labels, label_table
    from ..monitoring.loading_bars import show_loading
    from ..settings_check import check_config
    from ..task import make_task

    if output:
        check_chart_path(output)
    settings = parse_settings(config)
    task_source = find_task(task)
    instance = make_task(task_source, settings)
    with show_loading(Console(stderr=True)):
        labels = count_labels(instance, num_partitions)
    check_config(settings, instance, [task_source])
    console = Console()
    console.print(label_table(labels, console.width))
    if output:
        text = ", ".join(f"{key}={value}" for key, value in settings.items())
        title = f"{task}, {num_partitions} clients" + (f"\n{text}" if text else "")
        draw_chart(labels, output, title)
        typer.echo(f"Wrote {output}")


@app.command()
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The app's name, a module name.")],
) -> None:
    """Create a new app: a task that trains, as a starting point."""
    from .new_app import write_app

    write_app(name, Path.cwd())
    typer.echo(f"Created {name}/. Its README.md explains it. To run it, in three terminals:")
    typer.echo(f"  cd {name} && mlx-fed serve {name}:task")
    typer.echo(f"  cd {name} && mlx-fed join {name}:task --node-id 0")
    typer.echo(f"  cd {name} && mlx-fed join {name}:task --node-id 1")


app.add_typer(nodes_app, name="nodes")
app.add_typer(certs_app, name="certs")
app.add_typer(audit_app, name="audit")
app.add_typer(service_app, name="service")


@app.callback(invoke_without_command=True)
def print_version(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        typer.echo(f"mlx-fed {__version__}")
        raise typer.Exit
