"""Options that several commands have: each is declared once, in a dataclass with its group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer

from .arguments import parse_settings
from .option_kinds import count, option, tcp_port

_SECURITY = "Security"

TaskName = Annotated[
    str, typer.Argument(metavar="MODULE:TASK", help="The task, such as examples.mnist:task.")
]
Settings = Annotated[
    list[str] | None, option("KEY=VALUE", "A setting; can be repeated.", True, "--config", "-c")
]
Rounds = Annotated[int | None, count("Rounds to train.", "the task's, or 3")]
TokenArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[TOKEN]",
        help="The node's token that the server printed, or @FILE with it.",
        envvar="MLX_FED_TOKEN",
    ),
]
StrategyName = Annotated[str, option("NAME", "A Flower strategy, or MODULE:STRATEGY.")]
StrategyOptions = Annotated[
    list[str] | None,
    option(
        "KEY=VALUE",
        "An argument of the strategy; can be repeated.",
        True,
        "--strategy-option",
        "-s",
    ),
]
TestName = Annotated[
    str | None,
    option("MODULE:FUNCTION", "Function that returns test examples for evaluation on the server."),
]
NodeId = Annotated[
    int | None, count("The node's partition of the data.", "the token's, or 0", min=0)
]
NumPartitions = Annotated[int | None, count("Number of partitions, if the data has some.")]
SeedOption = Annotated[int, option("N", "The seed of all randomness.")]
RunsFolder = Annotated[Path, option("FOLDER", "The folder of runs.")]
FederationFolder = Annotated[
    Path,
    option(
        "FOLDER", "The folder of the federation's certificates, keys and nodes.", panel=_SECURITY
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Beyond this machine: do not encrypt, and let everyone join.",
        rich_help_panel=_SECURITY,
    ),
]
Wait = Annotated[float, option("SECONDS", "Time to wait for the other side.", min=0)]


class OptionGroup:
    """Base class of dataclasses whose fields are options, annotated for typer.

    Attributes:
        panel (str, optional): Heading in the help, of fields without one.
    """

    panel: ClassVar[str | None] = None


@dataclass(frozen=True)
class RunOptions(OptionGroup):
    """Checks of a run's replies, its end, and its folder."""

    panel = "Run"

    round_timeout: Annotated[
        float, option("SECONDS", "Time limit of a phase (training or evaluation).", min=0)
    ] = 3600.0
    min_replies: Annotated[
        int, count("Training replies that a round needs; with fewer it is repeated.")
    ] = 1
    max_repeats: Annotated[int, count("Repetitions of a round before the run stops.", min=0)] = 2
    max_examples: Annotated[
        float | None,
        count(
            "Limit on the number of examples that a reply claims.", "1000 times the others' median"
        ),
    ] = None
    max_update_norm: Annotated[
        float | None,
        option(
            "FACTOR", "Limit on an update's norm, in multiples of the median norm.", "100", min=1
        ),
    ] = None
    compress: Annotated[
        str | None,
        option(
            "NAME",
            "Compress updates: int8, int4, int2, int1, topk:0.01, randk:0.01, or two as in "
            "topk:0.01,int8.",
            "off",
        ),
    ] = None
    patience: Annotated[
        int | None, count("End after N rounds without a new lowest loss; 0: never.", "never", min=0)
    ] = None
    target: Annotated[
        str | None,
        option(
            "METRIC=VALUE", "End when the evaluation reaches it: accuracy=0.95, loss=0.1, ppl<=12."
        ),
    ] = None
    initial: Annotated[
        Path | None,
        option(
            "FILE",
            "Initial weights, such as the model.safetensors of another run.",
            "drawn by the seed",
            "--weights",
        ),
    ] = None
    name: Annotated[str | None, option("NAME", "The run's name.", "the time")] = None
    runs: RunsFolder = Path("runs")
    select_nodes: Annotated[
        str | None,
        option("NODES", "Nodes that participate: their names, node ids or tags (tag:TAG).", "all"),
    ] = None
    resume: Annotated[
        str | None,
        option("RUN", "Resume a run, by its name or folder, with the same other options."),
    ] = None
    change: Annotated[
        list[str] | None,
        option("KEY=VALUE", "With --resume: another value of a setting, from the next round on."),
    ] = None
    keep: Annotated[
        int, count("Checkpoints to keep, in addition to the best one; 0: none.", min=0)
    ] = 3

    def to_settings(self) -> dict[str, Any]:
        """The options as arguments of :func:`mlx_fed.serve` and :func:`mlx_fed.simulate`."""
        return {**vars(self), "change": parse_settings(self.change, "--change")}


@dataclass(frozen=True)
class OutputOptions(OptionGroup):
    """Options of a command's output."""

    panel = "Output"

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")] = False
    log_file: Annotated[
        Path | None,
        option("FILE", "Append lines with time and level; JSON if it ends in .jsonl."),
    ] = None


@dataclass(frozen=True)
class MonitorOptions(OutputOptions):
    """Options of a run's output and of its other listeners."""

    dashboard: Annotated[bool, typer.Option("--dashboard", help="Show the run in a browser.")] = (
        False
    )
    dashboard_port: Annotated[int, tcp_port("The dashboard's port; 0: any free port.")] = 8000
    track: Annotated[
        list[str] | None,
        option("NAME", "Log to a tracker: tensorboard, wandb or MODULE:TRACKER; can be repeated."),
    ] = None
    metrics: Annotated[
        str | None, option("[HOST:]PORT", "Serve /metrics for Prometheus, and /healthz, there.")
    ] = None
    hook: Annotated[
        list[str] | None,
        option("EVENT=COMMAND", "Run a command, or POST to a URL, at an event; can be repeated."),
    ] = None


@dataclass(frozen=True)
class ServerOptions(OptionGroup):
    """Address and security of a federation's server."""

    host: Annotated[str, option("HOST", "The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, tcp_port("The port; 0: any free port.")] = 8080
    insecure: Insecure = False
    secure: Annotated[
        bool,
        typer.Option(
            "--secure",
            help="On this machine, too: encrypt, and let only known nodes join.",
            rich_help_panel=_SECURITY,
        ),
    ] = False
    federation: FederationFolder = Path("federation")
    announce: Annotated[
        str | None,
        option(
            "HOST[:PORT]",
            "The address at which nodes reach the server.",
            "this machine's address",
            panel=_SECURITY,
        ),
    ] = None
    audit: Annotated[
        Path | None,
        option(
            "FILE",
            "The audit log: who joined, what was refused and received.",
            "in the federation's folder",
            panel=_SECURITY,
        ),
    ] = None
    wait: Wait = 600.0
    grace: Annotated[
        float | None,
        option(
            "SECONDS",
            "Time to wait for the other nodes once half have replied; inf: to the timeout.",
            "30, or 3 times what half needed",
            min=0,
        ),
    ] = None


@dataclass(frozen=True)
class JoinOptions(OptionGroup):
    """A node's server and its identity."""

    server: Annotated[
        str | None, option("HOST:PORT", "The server's address.", "the token's, or 127.0.0.1:8080")
    ] = None
    tags: Annotated[
        list[str] | None,
        option("TAG", "A tag that the server selects nodes by; can be repeated.", True, "--tag"),
    ] = None
    insecure: Insecure = False
    identity: Annotated[
        Path | None,
        option("FOLDER", "The folder of this node's key.", "below ~/.mlx-fed", panel=_SECURITY),
    ] = None
    root_certificates: Annotated[
        Path | None,
        option(
            "FILE",
            "Without a token: the certificate authority of the server (PEM).",
            panel=_SECURITY,
        ),
    ] = None
    key: Annotated[
        Path | None,
        option(
            "FILE",
            "Without a token: this node's private key; the server has the public one.",
            True,
            "--key",
            panel=_SECURITY,
        ),
    ] = None
    share_errors: Annotated[
        bool,
        typer.Option(
            "--share-errors",
            help="Send the texts of exceptions to the server, which may contain data, and not "
            "only their types and lines.",
            rich_help_panel=_SECURITY,
        ),
    ] = False
    policy: Annotated[
        Path | None,
        option(
            "FILE",
            "The owner's policy: what the server may ask of this node (TOML).",
            panel=_SECURITY,
        ),
    ] = None
    audit: Annotated[
        Path | None,
        option(
            "FILE",
            "The audit log of requests, refusals and sent data.",
            "beside the policy",
            panel=_SECURITY,
        ),
    ] = None
    wait: Wait = 600.0


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that replaces each :class:`OptionGroup` parameter by an option for each field."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, OptionGroup):
            groups[parameter.name] = kind
            parameters += _parameters(kind)
        else:
            parameters.append(parameter)

    def call(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{item.name: values.pop(item.name) for item in fields(group)})
        command(**values)

    return with_parameters(command, call, parameters)


def _parameters(group: type[OptionGroup]) -> list[inspect.Parameter]:
    annotations = get_type_hints(group, include_extras=True)
    parameters = []
    for item in fields(group):  # type: ignore[arg-type]
        kind, option = get_args(annotations[item.name])
        option = copy(option)
        option.rich_help_panel = option.rich_help_panel or group.panel
        keyword = inspect.Parameter.KEYWORD_ONLY
        annotation: Any = Annotated[kind, option]
        parameters.append(
            inspect.Parameter(item.name, keyword, default=item.default, annotation=annotation)
        )
    return parameters


def with_parameters(
    command: Callable[..., None],
    call: Callable[..., None],
    parameters: Iterable[inspect.Parameter],
) -> Callable[..., None]:
    """The function ``call`` with a command's name and docstring and other keyword parameters."""
    keywords = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in parameters]
    function: Any = wraps(command)(call)
    del function.__wrapped__
    function.__signature__ = inspect.Signature(keywords)
    function.__annotations__ = {item.name: item.annotation for item in keywords}
    result: Callable[..., None] = function
    return result


def to_arguments(options: OptionGroup) -> list[str]:
    """Options as command-line arguments, without those that have their default value."""
    arguments = []
    annotations = get_type_hints(type(options), include_extras=True)
    for item in fields(options):  # type: ignore[arg-type]
        name = get_args(annotations[item.name])[1].default  # typer's place of the first name
        value, flag = getattr(options, item.name), f"--{item.name.replace('_', '-')}"
        flag = name if isinstance(name, str) else flag
        if value is True:
            arguments.append(flag)
        elif value != item.default:
            values = value if isinstance(value, list) else [value]
            arguments += [f"{flag}={text}" for text in values]
    return arguments
