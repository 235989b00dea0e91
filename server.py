"""Server of the MNIST example: start it, then two clients or more."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports: no traceback

from typing import Annotated

import typer

from mlx_fed.cli.application import run_command
from mlx_fed.cli.arguments import find_strategy, parse_settings
from mlx_fed.cli.options import (
    MonitorOptions,
    RunOptions,
    SeedOption,
    ServerOptions,
    Settings,
    StrategyOptions,
    with_options,
)


@with_options
def main(
    *,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rounds to train.", show_default="the dataset's"),
    ] = None,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="digits, mnist, or a folder of parquet files.")
    ] = "digits",
    min_clients: Annotated[
        int, typer.Option(min=1, metavar="N", help="Clients that a round needs.")
    ] = 2,
    strategy: Annotated[str, typer.Option(metavar="NAME", help="A Flower strategy.")] = "FedAvg",
    strategy_option: StrategyOptions = None,
    config: Settings = None,
    seed: SeedOption = 0,
    server: ServerOptions,
    run: RunOptions,
    monitor: MonitorOptions,
) -> None:
    """Serve the MNIST example to clients, and save the trained model."""
    from examples.mnist import task
    from examples.mnist.mnist import settings
    from mlx_fed import serve
    from mlx_fed.monitoring.listeners import run_listeners

    changed = parse_settings([f"dataset={dataset}", *(config or ())])
    flower_strategy = find_strategy(strategy, min_clients, parse_settings(strategy_option, "-s"))
    if not (monitor.quiet or monitor.json):
        shown = {**settings(dataset), **parse_settings(config)}
        shown |= {"num-rounds": rounds} if rounds else {}
        text = ", ".join(f"{key} {value}" for key, value in shown.items())
        typer.echo(f"{dataset}: {text}")
    with run_listeners(run.runs, **vars(monitor)) as listeners:
        serve(
            task,
            flower_strategy,
            rounds,
            **vars(server),
            **run.to_settings(),
            listeners=listeners,
            join_command="python3 client.py",
            seed=seed,
            config=changed,
        )


if __name__ == "__main__":
    run_command(main)
