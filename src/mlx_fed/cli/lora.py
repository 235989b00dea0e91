"""``mlx-fed lora``: the commands for language models, with mlx-lm's configuration file."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..arrays import randomness
from ..events import Notice
from ..lm.base_model import is_folder, require_mlx_lm
from ..lm.config import ConfigError, LoraConfig, LoraFederation, load_config
from ..task_settings import kebab_case
from .application import App
from .arguments import find_strategy
from .option_kinds import count, option
from .options import (
    JoinOptions,
    MonitorOptions,
    NumPartitions,
    OutputOptions,
    RunOptions,
    ServerOptions,
    TokenArgument,
    with_options,
    with_parameters,
)

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

lora_app = App("Fine-tune a language model with mlx-lm; texts stay local.")

ConfigFile = Annotated[
    Path | None,
    option("FILE", "mlx-lm's YAML file, with a section federation:.", True, "--config", "-c"),
]
Gpu = Annotated[
    bool | None, typer.Option("--gpu/--cpu", help="The device.", show_default="MLX's default")
]
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _options(section: type, panel: str) -> list[inspect.Parameter]:
    """An option for each key of a configuration's section, except for nested sections."""
    kinds, annotations = get_type_hints(section), get_type_hints(section, include_extras=True)
    options = []
    for item in fields(section):
        if not isinstance(item.default, (int, float, str, NoneType)) or item.name == "lr_schedule":
            continue
        kind = kinds[item.name]
        option = typer.Option(
            help=annotations[item.name].__metadata__[0],
            metavar=next((text for of, text in _METAVARS.items() if kind in (of, of | None)), None),
            show_default=False if item.default is None else str(item.default),
            rich_help_panel=panel,
        )
        annotation: Any = Annotated[kind | None, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(item.name, keyword, default=None, annotation=annotation))
    return options


_CONFIG_OPTIONS = [*_options(LoraConfig, "mlx-lm's keys"), *_options(LoraFederation, "Federation")]


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that replaces the parameter ``config`` by ``--config FILE`` and an option for each
    key, which has precedence over the file."""

    def call(**values: Any) -> None:
        options = {option.name: values.pop(option.name) for option in _CONFIG_OPTIONS}
        require_mlx_lm()
        config = load_config(values.pop("config"), options, _note)
        command(config=config, **values)

    config, *parameters = inspect.signature(command, eval_str=True).parameters.values()
    file = config.replace(default=None, annotation=ConfigFile)
    return with_parameters(command, call, [file, *parameters, *_CONFIG_OPTIONS])


@lora_app.command()
@with_config
@with_options
def simulate(
    *,
    config: LoraConfig,
    workers: Annotated[
        int, count("Worker processes, each with the model; 0: train in this process.", min=0)
    ] = 0,
    gpu: Gpu = None,
    run: RunOptions,
    monitor: MonitorOptions,
) -> None:
    """Simulate a federation, with a client for each folder in --data."""
    from ..lm.lora_task import lora_task
    from ..lm.samples import sampler
    from ..lm.texts import folders_of_texts
    from ..monitoring.listeners import run_listeners
    from ..simulation.simulate import simulate

    folders = folders_of_texts(Path(config.data).expanduser())
    num_clients = config.federation.nodes or len(folders) or 2
    with run_listeners(run.runs, **vars(monitor)) as listeners:

        def note(text: str) -> None:
            for listener in listeners:
                listener(Notice(text))

        task = lora_task(config, note)
        # All texts are checked before the first round.
        data = [task.data(client, num_clients) for client in range(num_clients)]
        simulate(
            replace(task, data=lambda partition_id, num_partitions: data[partition_id]),
            make_strategy(config, 1),
            num_clients,
            config.federation.rounds,
            **run.to_settings(),
            listeners=listeners,
            workers=workers,
            seed=config.seed,
            device=_device(gpu),
            evaluate_fn=sampler(config, task),
        )


@lora_app.command()
@with_config
@with_options
def serve(
    *,
    config: LoraConfig,
    gpu: Annotated[bool, typer.Option("--gpu/--cpu", help="The device of aggregation.")] = False,
    server: ServerOptions,
    run: RunOptions,
    monitor: MonitorOptions,
) -> None:
    """Serve a federation: wait for nodes, train, save the adapters."""
    from ..fleet.server import serve
    from ..lm.lora_task import lora_task
    from ..lm.samples import sampler
    from ..monitoring.listeners import run_listeners

    min_nodes = config.federation.nodes or 2
    task = lora_task(config)
    with run_listeners(run.runs, **vars(monitor)) as listeners:
        serve(
            task,
            make_strategy(config, min_nodes),
            config.federation.rounds,
            **vars(server),
            **run.to_settings(),
            listeners=listeners,
            join_command="mlx-fed lora join -c lora.yaml --data FOLDER",
            seed=config.seed,
            min_nodes=min_nodes,
            device=_device(gpu),
            evaluate_fn=sampler(config, task),
        )


@lora_app.command()
@with_config
@with_options
def join(
    *,
    config: LoraConfig,
    token: TokenArgument = None,
    name: Annotated[
        str | None,
        option("NAME", "The node's name on the server.", "the token's, or MACHINE-FOLDER"),
    ] = None,
    node_id: Annotated[
        int | None,
        count(
            "The node's number, or its partition of shared data.",
            "the token's, or from the name",
            min=0,
        ),
    ] = None,
    num_partitions: NumPartitions = None,
    gpu: Gpu = None,
    connection: JoinOptions,
    output: OutputOptions,
) -> None:
    """Join a federation, and train on the texts in --data."""
    from ..fleet import tokens
    from ..fleet.node import join
    from ..lm.lora_task import lora_task
    from ..monitoring.listeners import node_listener
    from ..monitoring.node_terminal import node_listener_or_terminal

    if num_partitions is not None and node_id is None:
        raise ConfigError("--num-partitions needs --node-id, the number of this node's partition.")
    if token is not None:
        invitation = tokens.read(token)
        name = invitation.name if name is None else name
        node_id = invitation.number if node_id is None else node_id
    if name is None and node_id is None:
        name = f"{socket.gethostname().split('.')[0]}-{Path(config.data).resolve().name}"[:64]
    if node_id is None:
        node_id = randomness.derive(0, str(name)) % 2**31
    with (
        node_listener(**vars(output)) as output_listener,
        node_listener_or_terminal(output_listener) as listener,
    ):
        # The server sends the adapters to start from.
        node_config = replace(config, resume_adapter_file=None)
        task = lora_task(node_config, note=lambda text: listener(Notice(text)))
        data = task.data(node_id, num_partitions)
        if is_folder(config.model):  # of a model on the hub, weights come after the roll call
            task.model()  # reports an error of the model now, not at the server's first request
        join(
            replace(task, data=lambda partition_id, num_partitions: data),
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            name=name,
            device=_device(gpu),
            steps_per_report=-(-config.steps_per_report // config.grad_accumulation_steps),
            listener=listener,
            **vars(connection),
        )


def make_strategy(config: LoraConfig, min_nodes: int) -> Strategy:
    """The configuration's strategy, with its share of nodes and their weights."""
    federation = config.federation
    source = "federation.strategy_options"
    options: dict[str, Any] = {}
    if federation.fraction != 1.0:
        options["fraction-train"] = federation.fraction
    if config.val_batches == 0:
        options["fraction-evaluate"] = 0.0
    if federation.weighting == "tokens":
        options["weighted-by-key"] = "num-tokens"
    options |= kebab_case(federation.strategy_options, source)
    return find_strategy(federation.strategy, min_nodes, options, source)


def _note(text: str) -> None:
    typer.echo(f"Note: {text}", err=True)


def _device(gpu: bool | None) -> str | None:
    return None if gpu is None else "gpu" if gpu else "cpu"
