"""The server of the MNIST example: start it, then two clients or more."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_fed.arguments import (
    Keep,
    MaxExamples,
    MaxRepeats,
    MaxUpdateNorm,
    MinReplies,
    Resume,
    errors_as_messages,
    find_strategy,
)


def main(
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to train.", show_default="the dataset's")
    ] = None,
    dataset: Annotated[str, typer.Option(help="digits, mnist, or a folder of parquet.")] = "digits",
    min_clients: Annotated[int, typer.Option(min=1, help="Clients that a round needs.")] = 2,
    strategy: Annotated[str, typer.Option(help="One of Flower's strategies.")] = "FedAvg",
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow unencrypted connections beyond this machine.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="The run's name.", show_default="the time")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    resume: Resume = None,
    keep: Keep = 3,
    min_replies: MinReplies = 1,
    max_repeats: MaxRepeats = 2,
    max_examples: MaxExamples = 1e12,
    max_update_norm: MaxUpdateNorm = None,
) -> None:
    """Serve the MNIST example to clients, and save the model that they train."""
    with errors_as_messages():
        from examples.mnist import task
        from examples.mnist.mnist import settings
        from mlx_fed import serve

        chosen = settings(dataset) | ({"num-rounds": rounds} if rounds else {})
        typer.echo(f"{dataset}: " + ", ".join(f"{key} {value}" for key, value in chosen.items()))
        serve(
            task,
            find_strategy(strategy, min_clients, {}),
            rounds,
            host=host,
            port=port,
            insecure=insecure,
            seed=seed,
            name=name,
            runs=runs,
            resume=resume,
            keep=keep,
            min_replies=min_replies,
            max_repeats=max_repeats,
            max_examples=max_examples,
            max_update_norm=max_update_norm,
            config={"dataset": dataset},
        )


if __name__ == "__main__":
    typer.run(main)
