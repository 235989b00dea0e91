"""Client of the MNIST example: python3 client.py --node-id 0 [--gpu]"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during imports: no traceback

from typing import Annotated

import typer

from mlx_fed.cli.application import run_command
from mlx_fed.cli.arguments import parse_settings
from mlx_fed.cli.options import (
    JoinOptions,
    OutputOptions,
    Settings,
    TokenArgument,
    with_options,
)


@with_options
def main(
    *,
    token: TokenArgument = None,
    node_id: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="The client's partition of the data.", show_default="the token's"
        ),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="digits, mnist, or a folder of parquet files.")
    ] = "digits",
    num_partitions: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of partitions of the data.")
    ] = 3,
    partitioner: Annotated[str, typer.Option(metavar="NAME", help="iid or dirichlet.")] = "iid",
    config: Settings = None,
    connection: JoinOptions,
    output: OutputOptions,
) -> None:
    """Train on this client's digits until the server's run ends."""
    if node_id is None and token is None:
        raise typer.BadParameter("name the partition of the data: --node-id 0")
    from examples.mnist import task
    from mlx_fed import join
    from mlx_fed.monitoring.listeners import node_listener

    with node_listener(**vars(output)) as listener:
        join(
            task,
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            device="gpu" if gpu else "cpu",
            config=parse_settings(
                [f"dataset={dataset}", f"partitioner={partitioner}", *(config or ())]
            ),
            listener=listener,
            **vars(connection),
        )


if __name__ == "__main__":
    run_command(main)
