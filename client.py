"""A client of the MNIST example: python3 client.py --node-id 0 [--gpu]"""

from typing import Annotated

import typer

from mlx_fed.arguments import errors_as_messages


def main(
    node_id: Annotated[int, typer.Option(help="Which part of the data this client holds.")],
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    server: Annotated[str, typer.Option(metavar="HOST:PORT")] = "127.0.0.1:8080",
    dataset: Annotated[str, typer.Option(help="digits, mnist, or a folder of parquet.")] = "digits",
    num_partitions: Annotated[int, typer.Option(min=1, help="Parts that the data has.")] = 3,
    partitioner: Annotated[str, typer.Option(help="iid or dirichlet.")] = "iid",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow unencrypted connections beyond this machine.")
    ] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the server.")] = 600.0,
) -> None:
    """Train on this client's digits until the server's run is over."""
    with errors_as_messages():
        from examples.mnist import task
        from mlx_fed import join

        join(
            task,
            server,
            partition_id=node_id,
            num_partitions=num_partitions,
            device="gpu" if gpu else "cpu",
            config={"dataset": dataset, "partitioner": partitioner},
            insecure=insecure,
            wait=wait,
        )


if __name__ == "__main__":
    typer.run(main)
