"""The options of commands, each once; those of one kind go into a command as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_SECURITY = "Security"

TaskName = Annotated[
    str, typer.Argument(metavar="MODULE:TASK", help="The task, such as examples.mnist:task.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--config", "-c", metavar="KEY=VALUE", help="A setting; as often as needed."),
]
Rounds = Annotated[
    int | None, typer.Option(min=1, help="Rounds to train.", show_default="the task's, or 3")
]
Token = Annotated[
    str | None,
    typer.Argument(
        metavar="[TOKEN]",
        help="What the server printed for this node, if it did; or @FILE, which has it.",
        envvar="MLX_FED_TOKEN",
    ),
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
RunsFolder = Annotated[Path, typer.Option(help="Where runs are kept.")]
FederationFolder = Annotated[
    Path,
    typer.Option(
        help="The federation's folder: certificates, keys, nodes.", rich_help_panel=_SECURITY
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Beyond this machine: do not encrypt, and let anyone join.",
        rich_help_panel=_SECURITY,
    ),
]
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait for the other side.")]


class Options:
    """Options of one kind: a dataclass whose fields have typer's annotations."""


@dataclass(frozen=True)
class Leading(Options):
    """How a run is led, and where it is kept."""

    round_timeout: Annotated[float, typer.Option(min=0, help="Seconds that a phase may take.")] = (
        3600.0
    )
    min_replies: Annotated[
        int,
        typer.Option(min=1, help="Training replies that have to count, or the round is repeated."),
    ] = 1
    max_repeats: Annotated[
        int, typer.Option(min=0, help="Times that a round is repeated before the run stops.")
    ] = 2
    max_examples: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Examples that a node's reply may say it has.",
            show_default="1000 times the others' median",
        ),
    ] = None
    max_update_norm: Annotated[
        float | None,
        typer.Option(
            min=1, help="Times the median norm that an update may have.", show_default="100"
        ),
    ] = None
    patience: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="End after so many rounds without a new lowest loss; 0: never.",
            show_default="never",
        ),
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC=VALUE",
            help="End when the evaluation has reached it: accuracy=0.95, loss=0.1, ppl<=12.",
        ),
    ] = None
    name: Annotated[str | None, typer.Option(help="The run's name.", show_default="the time")] = (
        None
    )
    runs: RunsFolder = Path("runs")
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="RUN", help="Go on with a run, by its name or folder; all else as it was."
        ),
    ] = None
    keep: Annotated[
        int, typer.Option(min=0, help="Checkpoints to keep, beside the best; 0: none.")
    ] = 3


@dataclass(frozen=True)
class Showing(Options):
    """How much is shown, and how."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")] = False
    json: Annotated[bool, typer.Option("--json", help="Show JSON, an object a line.")] = False


@dataclass(frozen=True)
class Watching(Showing):
    """Who watches a run as it goes."""

    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="Show the run in a browser, as it goes.")
    ] = False
    dashboard_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="The dashboard's, on this machine; 0: a free one."),
    ] = 8000
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Log to a tracker: tensorboard, wandb, or MODULE:TRACKER of your own.",
        ),
    ] = None


@dataclass(frozen=True)
class Listening(Options):
    """Where a federation's server is, and for whom."""

    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080
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
        typer.Option(
            metavar="HOST[:PORT]",
            help="Where nodes reach the server.",
            show_default="this machine's address",
            rich_help_panel=_SECURITY,
        ),
    ] = None
    wait: Wait = 600.0


@dataclass(frozen=True)
class Joining(Options):
    """Which server a node joins, and as whom."""

    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", show_default="the token's, or 127.0.0.1:8080"),
    ] = None
    insecure: Insecure = False
    identity: Annotated[
        Path | None,
        typer.Option(
            help="Where this node's key is kept.",
            show_default="below ~/.mlx-fed",
            rich_help_panel=_SECURITY,
        ),
    ] = None
    root_certificates: Annotated[
        Path | None,
        typer.Option(
            help="Without a token: whom the server's certificate is from.",
            rich_help_panel=_SECURITY,
        ),
    ] = None
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            help="Without a token: this node's private key, known to the server.",
            rich_help_panel=_SECURITY,
        ),
    ] = None
    share_errors: Annotated[
        bool,
        typer.Option(
            "--share-errors",
            help="Tell the server what exceptions say, which may hold data, and not only where.",
            rich_help_panel=_SECURITY,
        ),
    ] = False
    policy: Annotated[
        Path | None,
        typer.Option(
            help="What the server may ask of this node (TOML, see the docs).",
            rich_help_panel=_SECURITY,
        ),
    ] = None
    audit: Annotated[
        Path | None,
        typer.Option(
            help="The audit log: what was asked, refused and sent.",
            show_default="beside the policy",
            rich_help_panel=_SECURITY,
        ),
    ] = None
    wait: Wait = 600.0


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for each field of the :class:`Options` among its parameters."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    groups = {each.name: each.annotation for each in own if _is_group(each.annotation)}
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters: list[inspect.Parameter] = []
    for each in own:
        flags = _flags(groups[each.name]) if each.name in groups else [each]
        parameters += [flag.replace(kind=keyword) for flag in flags]

    @wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{item.name: values.pop(item.name) for item in fields(group)})
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    del run.__wrapped__
    return run


def _is_group(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Options)


def _flags(group: type[Any]) -> list[inspect.Parameter]:
    annotated, keyword = get_type_hints(group, include_extras=True), inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(item.name, keyword, default=item.default, annotation=annotated[item.name])
        for item in fields(group)
    ]


def as_flags(options: Any) -> list[str]:
    """Options as another command takes them, without those that are as they are by default."""
    flags = []
    for item in fields(options):
        value, flag = getattr(options, item.name), f"--{item.name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value != item.default:
            flags += [f"{flag}={each}" for each in (value if isinstance(value, list) else [value])]
    return flags
