"""``mlx-fed lora``: the same three commands for language models, with mlx-lm's configuration."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..arrays import randomness
from ..lm.base_model import is_folder, require_mlx_lm
from ..lm.config import ConfigError, Federation, LoraConfig, load_config
from ..task_settings import kebab_case
from .arguments import errors_as_messages, find_strategy
from .options import Joining, Leading, Listening, Showing, Token, Watching, with_options

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

lora = typer.Typer(
    help="Fine-tune a language model that mlx-lm knows, on texts that stay where they are.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="mlx-lm's YAML file, with a section federation:."),
]
Gpu = Annotated[
    bool | None, typer.Option("--gpu/--cpu", help="Where to compute.", show_default="MLX's choice")
]


def _flags(cls: type, panel: str) -> list[inspect.Parameter]:
    """An option for each key of a part of the configuration; sections are the file's alone."""
    kinds, annotated = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    flags = []
    for item in fields(cls):
        if not isinstance(item.default, (int, float, str, NoneType)) or item.name == "lr_schedule":
            continue
        option = typer.Option(
            help=annotated[item.name].__metadata__[0],
            show_default=False if item.default is None else str(item.default),
            rich_help_panel=panel,
        )
        kind: Any = Annotated[kinds[item.name] | None, option]
        keyword = inspect.Parameter.KEYWORD_ONLY
        flags.append(inspect.Parameter(item.name, keyword, default=None, annotation=kind))
    return flags


_FLAGS = [*_flags(LoraConfig, "mlx-lm's keys"), *_flags(Federation, "The federation")]


def with_config(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the option ``--config`` and a flag for each key of the configuration.

    The command itself is called with the :class:`LoraConfig` that comes of them.
    """

    @wraps(command)
    def run(**values: Any) -> None:
        given = {flag.name: values.pop(flag.name) for flag in _FLAGS}
        with errors_as_messages():
            require_mlx_lm()
            config = load_config(values.pop("config"), given, _note)
            command(config=config, **values)

    _, *own = inspect.signature(command, eval_str=True).parameters.values()
    file = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=ConfigFile
    )
    parameters = [file, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own), *_FLAGS]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__
    return run


@lora.command()
@with_config
@with_options
def serve(
    *,
    config: LoraConfig,
    gpu: Annotated[bool, typer.Option("--gpu/--cpu", help="Where to aggregate.")] = False,
    listening: Listening,
    leading: Leading,
    shown: Watching,
) -> None:
    """Serve a federation: wait for nodes, train, save the adapters."""
    from ..fleet.server import serve
    from ..lm.lora_task import lora_task
    from ..lm.samples import sampler
    from ..monitoring.listeners import run_listeners

    nodes = config.federation.nodes or 2
    task = lora_task(config)
    with run_listeners(leading.runs, **vars(shown)) as listeners:
        serve(
            task,
            make_strategy(config, nodes),
            config.federation.rounds,
            **vars(listening),
            **vars(leading),
            listeners=listeners,
            join_command="mlx-fed lora join -c lora.yaml --data FOLDER",
            seed=config.seed,
            min_nodes=nodes,
            device=_device(gpu),
            evaluate_fn=sampler(config, task),
        )


@lora.command()
@with_config
@with_options
def join(
    *,
    config: LoraConfig,
    token: Token = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="How the server calls this node.", show_default="the token's, or machine-folder"
        ),
    ] = None,
    node_id: Annotated[
        int | None,
        typer.Option(
            min=0, help="A number of its own.", show_default="the token's, or from the name"
        ),
    ] = None,
    num_partitions: Annotated[
        int | None, typer.Option(min=1, help="Of how many parts it holds that one, if shared.")
    ] = None,
    gpu: Gpu = None,
    joining: Joining,
    shown: Showing,
) -> None:
    """Join a federation with the texts in --data, until the run is over."""
    from ..fleet import tokens
    from ..fleet.node import join
    from ..lm.lora_task import lora_task
    from ..monitoring.listeners import node_listener
    from ..monitoring.node_terminal import node_listener_or_terminal

    if num_partitions is not None and node_id is None:
        raise ConfigError("--num-partitions needs --node-id, which of the parts is this node's.")
    if token is not None:
        invitation = tokens.read(token)
        name = invitation.name if name is None else name
        node_id = invitation.number if node_id is None else node_id
    if name is None and node_id is None:
        name = f"{socket.gethostname().split('.')[0]}-{Path(config.data).resolve().name}"[:64]
    if node_id is None:
        node_id = randomness.derive(0, str(name)) % 2**31
    with node_listener_or_terminal(node_listener(**vars(shown))) as tell:
        # Adapters to start from are the server's, which sends them.
        own = replace(config, resume_adapter_file=None)
        task = lora_task(own, note=lambda text: tell("note", text=text))
        data = task.data(node_id, num_partitions)
        if is_folder(config.model):  # else its weights are downloaded when the server has agreed
            task.model()  # what is wrong with it is said now, and not when the server asks
        join(
            replace(task, data=lambda partition_id, num_partitions: data),
            token=token,
            partition_id=node_id,
            num_partitions=num_partitions,
            name=name,
            device=_device(gpu),
            notify=tell,
            **vars(joining),
        )


@lora.command()
@with_config
@with_options
def simulate(
    *,
    config: LoraConfig,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes, each with the model; 0 is none but this.")
    ] = 0,
    gpu: Gpu = None,
    leading: Leading,
    shown: Watching,
) -> None:
    """Simulate a federation on this machine: a client for each folder of texts in --data."""
    from ..lm.lora_task import lora_task
    from ..lm.samples import sampler
    from ..lm.texts import folders_of_texts
    from ..monitoring.listeners import run_listeners
    from ..simulation.simulate import simulate

    folders = folders_of_texts(Path(config.data).expanduser())
    clients = config.federation.nodes or len(folders) or 2
    with run_listeners(leading.runs, **vars(shown)) as listeners:

        def note(text: str) -> None:
            for listener in listeners:
                listener("note", {"text": text})

        task = lora_task(config, note)
        data = [task.data(client, clients) for client in range(clients)]  # all are looked at first
        simulate(
            replace(task, data=lambda partition_id, num_partitions: data[partition_id]),
            make_strategy(config, 1),
            clients,
            config.federation.rounds,
            **vars(leading),
            listeners=listeners,
            workers=workers,
            seed=config.seed,
            device=_device(gpu),
            evaluate_fn=sampler(config, task),
        )


def make_strategy(config: LoraConfig, min_nodes: int) -> Strategy:
    """The strategy that a configuration names, with its share of nodes and their weights."""
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
