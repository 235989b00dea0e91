"""The ``mlx-fed`` command, and what every command of ours does about errors and Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import FedError
from .lm.commands import lora

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from .task import TaskSource

app = typer.Typer(
    help="Federated learning for MLX models, on Flower's engine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(lora, name="lora")

TaskName = Annotated[
    str, typer.Argument(metavar="MODULE:TASK", help="The task, such as examples.mnist:task.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", metavar="KEY=VALUE", help="A setting; as often as needed."),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Allow unencrypted connections beyond this machine.")
]
StrategyName = Annotated[
    str, typer.Option(help="A Flower strategy's name, or MODULE:STRATEGY of your own.")
]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option("--strategy-option", "-s", metavar="KEY=VALUE", help="Its arguments."),
]
TestName = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:FUNCTION",
        help="Gives held-out examples of the server's own (see the docs).",
    ),
]
RunName = Annotated[str | None, typer.Option(help="The run's name.", show_default="the time")]
RunsFolder = Annotated[Path, typer.Option(help="Where runs are kept.")]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="RUN", help="Go on with a run, by its name or folder; all else as it was."
    ),
]
Keep = Annotated[int, typer.Option(min=0, help="Checkpoints to keep, beside the best; 0: none.")]
Wait = Annotated[float, typer.Option(help="Seconds to wait for the other side.")]


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Turns our errors into one message and exit code 1, and Ctrl-C into exit code 130."""
    try:
        yield
    except FedError as error:
        from .progress import printable

        shown = "\n".join(printable(line) for line in str(error).splitlines())
        typer.secho(f"Error: {shown}", fg="red", err=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise SystemExit(130) from None


@app.command()
def serve(
    task: TaskName,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to train.", show_default="the task's, or 3")
    ] = None,
    strategy: StrategyName = "FedAvg",
    strategy_option: StrategyOptions = None,
    min_nodes: Annotated[int, typer.Option(min=1, help="Nodes that a round needs.")] = 2,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    insecure: Insecure = False,
    wait: Wait = 600.0,
    round_timeout: Annotated[float, typer.Option(help="Seconds that a phase may take.")] = 3600.0,
    seed: int = 0,
    name: RunName = None,
    runs: RunsFolder = Path("runs"),
    resume: Resume = None,
    keep: Keep = 3,
    gpu: Annotated[bool, typer.Option("--gpu", help="Aggregate on the GPU.")] = False,
    test: TestName = None,
    config: Settings = None,
) -> None:
    """Serve a federation: wait for nodes, train, save the model."""
    with errors_as_messages():
        settings = parse_settings(config)
        from .fleet.server import serve

        serve(
            find_task(task),
            find_strategy(strategy, min_nodes, parse_settings(strategy_option)),
            rounds,
            host=host,
            port=port,
            insecure=insecure,
            wait=wait,
            round_timeout=round_timeout,
            seed=seed,
            min_nodes=min_nodes,
            name=name,
            runs=runs,
            resume=resume,
            keep=keep,
            device="gpu" if gpu else "cpu",
            config=settings,
            test=find_test(test, settings) if test else None,
        )


@app.command()
def join(
    task: TaskName,
    node_id: Annotated[int, typer.Option(min=0, help="Which part of the data is held here.")] = 0,
    num_partitions: Annotated[
        int | None, typer.Option(min=1, help="Of how many, if the data is partitioned.")
    ] = None,
    server: Annotated[str, typer.Option(metavar="HOST:PORT")] = "127.0.0.1:8080",
    name: Annotated[str | None, typer.Option(help="How the server calls this node.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    insecure: Insecure = False,
    wait: Wait = 600.0,
    config: Settings = None,
) -> None:
    """Join a federation with this machine's data, until the run is over."""
    with errors_as_messages():
        from .fleet.node import join

        join(
            find_task(task),
            server,
            partition_id=node_id,
            num_partitions=num_partitions,
            name=name,
            device="gpu" if gpu else "cpu",
            insecure=insecure,
            wait=wait,
            config=parse_settings(config),
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

        from .partitions import check_picture, count_labels, draw, show
        from .task import make_task

        if output:
            check_picture(output)
        settings = parse_settings(config)
        made = make_task(find_task(task), settings)
        labels = count_labels(made, num_partitions, Console(stderr=True))
        console = Console()
        console.print(show(labels, console.width))
        if output:
            given = ", ".join(f"{key}={value}" for key, value in settings.items())
            draw(
                labels,
                output,
                f"{task}, {num_partitions} clients" + (f"\n{given}" if given else ""),
            )
            typer.echo(f"Drawn: {output}")


@app.command()
def simulate(
    task: TaskName,
    clients: Annotated[int, typer.Option(min=1, help="Clients that there are.")] = 100,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds to train.", show_default="the task's, or 3")
    ] = None,
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="The share of clients that train in a round.")
    ] = 1.0,
    fraction_evaluate: Annotated[
        float, typer.Option(min=0, max=1, help="The share of clients that evaluate after it.")
    ] = 1.0,
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
    hostile: Annotated[
        float, typer.Option(min=0, max=1, help="The share of clients that attack.")
    ] = 0.0,
    attack: Annotated[str, typer.Option(help="sign-flip, scale or label-flip.")] = "sign-flip",
    num_classes: Annotated[
        int | None, typer.Option(min=2, help="Labels that there are, for label-flip.")
    ] = None,
    seed: int = 0,
    name: RunName = None,
    runs: RunsFolder = Path("runs"),
    resume: Resume = None,
    keep: Keep = 3,
    gpu: Annotated[bool, typer.Option("--gpu", help="Train on the GPU.")] = False,
    config: Settings = None,
) -> None:
    """Simulate a whole federation on this machine."""
    with errors_as_messages():
        settings = parse_settings(config)
        from .simulation.faults import Faults
        from .simulation.simulate import simulate

        options = {
            "fraction-train": fraction,
            "fraction-evaluate": fraction_evaluate,
            **parse_settings(strategy_option),
        }
        found = find_task(task)
        simulate(
            found,
            find_strategy(strategy, 1, options),
            clients,
            rounds,
            batched=batched,
            chunk_size=chunk_size,
            workers=workers,
            faults=Faults(
                failure_rate=failure_rate,
                hostile=hostile,
                attack=attack,
                num_classes=num_classes,
            ),
            seed=seed,
            name=name,
            runs=runs,
            resume=resume,
            keep=keep,
            device="gpu" if gpu else "cpu",
            config=settings,
            test=find_test(test, settings) if test else None,
        )


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


def find_task(name: str) -> TaskSource:
    """The task, or the function that makes one, of ``module:task``.

    Raises:
        FedError: If there is no such module or name.
    """
    found: TaskSource = _find(name, "a task", "examples.mnist:task")
    return found


def find_strategy(name: str, min_nodes: int, options: dict[str, Any]) -> Strategy:
    """One of Flower's strategies by its name, or ``module:strategy``: one, or what makes one.

    Raises:
        FedError: If there is no such strategy, or it does not take the options.
    """
    import flwr.serverapp.strategy as flower

    from .progress import quiet_flower

    quiet_flower()
    if ":" in name:
        made = _find(name, "a strategy", "my_app:strategy")
    else:
        made = getattr(flower, name, None)
        if not (isinstance(made, type) and issubclass(made, flower.Strategy)):
            known = ", ".join(
                name
                for name in flower.__all__
                if name.startswith(("Bulyan", "Fed", "Krum", "Multi", "QFed")) and "Xgb" not in name
            )
            raise FedError(f"Flower has no strategy {name!r}. It has {known}.")
        least = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")
        options = {**dict.fromkeys(least, min_nodes), **options}
    if isinstance(made, flower.Strategy):
        return made
    try:
        strategy = made(**{key.replace("-", "_"): value for key, value in options.items()})
    except (TypeError, ValueError) as error:
        raise FedError(f"Cannot make the strategy {name!r}: {error}") from error
    if not isinstance(strategy, flower.Strategy):
        raise FedError(f"{name!r} gave a {type(strategy).__name__}, not a Flower strategy.")
    return strategy


def find_test(name: str, config: dict[str, Any]) -> Any:
    """The held-out examples that ``module:function`` gives for the settings.

    Raises:
        FedError: If there is no such function.
    """
    return _find(name, "a function that gives test examples", "examples.mnist:central_test")(config)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """``{"learning-rate": 0.1}`` of ``["learning-rate=0.1"]``: numbers, true and false, or text.

    Raises:
        FedError: If one is not KEY=VALUE.
    """
    parsed: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise FedError(f"{setting!r} is not KEY=VALUE, such as learning-rate=0.1.")
        parsed[key] = _value(value)
    return parsed


def _value(text: str) -> int | float | bool | str:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _find(name: str, what: str, example: str) -> Any:
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise FedError(f"{name!r} does not name {what}: it is MODULE:NAME, such as {example}.")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and module_name.startswith(error.name):
            raise FedError(
                f"There is no module {module_name!r}, neither in {Path.cwd()} nor installed."
            ) from error
        raise
    if not hasattr(module, attribute):
        raise FedError(f"The module {module_name!r} has no {attribute!r}.")
    return getattr(module, attribute)


def main() -> None:
    """The ``mlx-fed`` command."""
    app()
