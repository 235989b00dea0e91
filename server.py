"""The server of the MNIST example: start it, then two clients or more."""

from typing import Annotated

import typer

from mlx_fed.cli.arguments import errors_as_messages, find_strategy
from mlx_fed.cli.options import Leading, Listening, Watching, with_options


@with_options
def main(
    *,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to train.", show_default="the dataset's")
    ] = None,
    dataset: Annotated[str, typer.Option(help="digits, mnist, or a folder of parquet.")] = "digits",
    min_clients: Annotated[int, typer.Option(min=1, help="Clients that a round needs.")] = 2,
    strategy: Annotated[str, typer.Option(help="One of Flower's strategies.")] = "FedAvg",
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    listening: Listening,
    leading: Leading,
    shown: Watching,
) -> None:
    """Serve the MNIST example to clients, and save the model that they train."""
    with errors_as_messages():
        from examples.mnist import task
        from examples.mnist.mnist import settings
        from mlx_fed import serve
        from mlx_fed.monitoring.listeners import run_listeners

        chosen = settings(dataset) | ({"num-rounds": rounds} if rounds else {})
        if not (shown.quiet or shown.json):
            about = ", ".join(f"{key} {value}" for key, value in chosen.items())
            typer.echo(f"{dataset}: {about}")
        with run_listeners(leading.runs, **vars(shown)) as listeners:
            serve(
                task,
                find_strategy(strategy, min_clients, {}),
                rounds,
                **vars(listening),
                **vars(leading),
                listeners=listeners,
                join_command="python3 client.py",
                seed=seed,
                config={"dataset": dataset},
            )


if __name__ == "__main__":
    typer.run(main)
