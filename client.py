"""A client of the MNIST example: python3 client.py --node-id 0 [--gpu]"""

from typing import Annotated

import typer

from mlx_fed.cli.arguments import errors_as_messages
from mlx_fed.cli.options import Joining, Showing, Token, with_options


@with_options
def main(
    *,
    token: Token = None,
    node_id: Annotated[
        int | None,
        typer.Option(help="Which part of the data this client holds.", show_default="the token's"),
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    dataset: Annotated[str, typer.Option(help="digits, mnist, or a folder of parquet.")] = "digits",
    num_partitions: Annotated[int, typer.Option(min=1, help="Parts that the data has.")] = 3,
    partitioner: Annotated[str, typer.Option(help="iid or dirichlet.")] = "iid",
    joining: Joining,
    shown: Showing,
) -> None:
    """Train on this client's digits until the server's run is over."""
    if node_id is None and token is None:
        raise typer.BadParameter("name the part of the data: --node-id 0", param_hint="--node-id")
    with errors_as_messages():
        from examples.mnist import task
        from mlx_fed import join
        from mlx_fed.monitoring.listeners import node_listener

        join(
            task,
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            device="gpu" if gpu else "cpu",
            config={"dataset": dataset, "partitioner": partitioner},
            notify=node_listener(**vars(shown)),
            **vars(joining),
        )


if __name__ == "__main__":
    typer.run(main)
