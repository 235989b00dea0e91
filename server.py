"""The server of the MNIST example: start it, then two clients or more."""

from pathlib import Path
from typing import Annotated

import typer

from mlx_fed.arguments import (
    Announce,
    AsJson,
    Dashboard,
    DashboardPort,
    FederationFolder,
    Insecure,
    Keep,
    MaxExamples,
    MaxRepeats,
    MaxUpdateNorm,
    MinReplies,
    Quiet,
    Resume,
    Secure,
    Track,
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
    insecure: Insecure = False,
    secure: Secure = False,
    federation: FederationFolder = Path("federation"),
    announce: Announce = None,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="The run's name.", show_default="the time")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs"),
    resume: Resume = None,
    keep: Keep = 3,
    dashboard: Dashboard = False,
    dashboard_port: DashboardPort = 8000,
    track: Track = None,
    quiet: Quiet = False,
    json: AsJson = False,
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
        from mlx_fed.watching import watching

        chosen = settings(dataset) | ({"num-rounds": rounds} if rounds else {})
        if not (quiet or json):
            about = ", ".join(f"{key} {value}" for key, value in chosen.items())
            typer.echo(f"{dataset}: {about}")
        with watching(
            runs,
            dashboard=dashboard,
            dashboard_port=dashboard_port,
            track=track,
            quiet=quiet,
            json=json,
        ) as listeners:
            serve(
                task,
                find_strategy(strategy, min_clients, {}),
                rounds,
                host=host,
                port=port,
                insecure=insecure,
                secure=secure,
                federation=federation,
                announce=announce,
                join_command="python3 client.py",
                min_replies=min_replies,
                max_repeats=max_repeats,
                max_examples=max_examples,
                max_update_norm=max_update_norm,
                seed=seed,
                name=name,
                runs=runs,
                resume=resume,
                keep=keep,
                listeners=listeners,
                config={"dataset": dataset},
            )


if __name__ == "__main__":
    typer.run(main)
