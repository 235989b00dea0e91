"""Checks of a node or a server before a run: each finds one kind of fault and says what to do.

``mlx-fed check`` prints them. A check that cannot be made because of an earlier fault is left out.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from cryptography import x509

from ..arrays import examples
from ..errors import FedError
from ..flower.allowlist import REVOKED, UNKNOWN
from ..flower.fleet_client import FleetClient
from ..flower.transport import ClockDiffers, RequestRefused, Unreachable, UntrustedServer
from ..settings_check import check_config
from ..system import address, devices, http
from ..task import Data, Task, TaskSource, make_task
from ..task_settings import TracedConfig
from ..training import batches
from ..training.trainer import Trainer
from . import certificates
from .federation import Federation
from .identity import Identity, from_files, from_token
from .policy_file import load_policy

_SPARE_DISK = 256 * 2**20
_LONGEST_ANSWER = 30.0
"""Seconds for a server's answer."""
_SPARE_SHARE = 0.1
"""Of the machine's memory, which should stay free."""


class Finding(NamedTuple):
    """The result of one check.

    Args:
        name (str): What was checked.
        text (str): What was found.
        advice (str): What to do; empty where all is well.
        is_fault (bool): Whether a run would fail, and not only be slow or in doubt.
    """

    name: str
    text: str
    advice: str = ""
    is_fault: bool = False


class _Fault(Exception):
    """A fault that ends a check, with advice."""

    def __init__(self, text: str, advice: str):
        super().__init__(text)
        self.advice = advice


def check_node(
    task: Callable[[], TaskSource],
    server: str | None = None,
    *,
    token: str | None = None,
    partition_id: int | None = None,
    num_partitions: int | None = None,
    config: dict[str, Any] | None = None,
    device: str | None = None,
    identity: Path | None = None,
    root_certificates: Path | None = None,
    key: Path | None = None,
    policy: Path | None = None,
) -> Iterator[Finding]:
    """Checks what a node needs, in the order in which it would fail.

    Args:
        task (callable): Gives the task, or raises what is wrong with its name or module.
        server (str, optional): ``HOST:PORT``; without it and without a token no server is looked
            for.
        token (str, optional): The node's.
        partition_id (int, optional): The partition. Default: the token's, or ``0``.
        num_partitions (int, optional): Of how many.
        config (dict, optional): Settings that make the task.
        device (str, optional): ``"gpu"`` or ``"cpu"``.
        identity (Path, optional): As for :func:`mlx_fed.join`.
        root_certificates (Path, optional): As for :func:`mlx_fed.join`.
        key (Path, optional): As for :func:`mlx_fed.join`.
        policy (Path, optional): The policy's file.
    """
    identities: list[Identity] = []
    if server or token:
        yield from _check(
            "identity",
            lambda: identities.append(_identity(server, token, identity, root_certificates, key)),
            lambda _: _describe(identities[0]),
            "ask the server's operator for a new token, or name the right files",
        )
    if identities:
        partition_id = identities[0].number if partition_id is None else partition_id
        yield from _check_server(identities[0])
    if policy is not None:
        yield from _check(
            "policy",
            lambda: load_policy(policy),
            lambda _: f"{policy} can be read",
            "mend the file",
        )
    if identities and policy is not None:
        where = address.join(identities[0].host, identities[0].port)
        yield from _check(
            "policy",
            lambda: load_policy(policy).check_server(where),
            lambda _: f"it allows {where}",
            "add the server to `allowed` in [server] of the policy, if it is the right one",
        )
    yield from _check_folder("temporary files", Path(tempfile.gettempdir()), "set TMPDIR")
    yield from _check_task(task, config, device, partition_id or 0, num_partitions)


def check_server(
    task: Callable[[], TaskSource],
    *,
    host: str = address.DEFAULT_HOST,
    port: int = address.DEFAULT_PORT,
    announce: str | None = None,
    federation: Path = Path("federation"),
    runs: Path = Path("runs"),
    config: dict[str, Any] | None = None,
    device: str | None = "cpu",
) -> Iterator[Finding]:
    """Checks what a server needs, in the order in which it would fail.

    Args:
        task (callable): Gives the task, or raises what is wrong with its name or module.
        host (str): The address to listen on.
        port (int): The port.
        announce (str, optional): ``HOST:PORT`` by which nodes reach the server.
        federation (Path): The federation's folder.
        runs (Path): Where runs are kept.
        config (dict, optional): Settings that make the task.
        device (str, optional): Where the server aggregates.
    """
    yield from _check(
        "port",
        lambda: http.listen(host, port).close(),
        lambda _: f"{address.join(host, port)} is free",
        "end what listens there, or choose another --host or --port",
    )
    if announce is not None:
        yield from _check(
            "address", lambda: _resolve(announce), str, "announce an address that nodes can reach"
        )
    if (federation / "ca.crt").exists():
        yield from _check(
            "certificates",
            lambda: _certificates(federation),
            str,
            "put the files right, or make them anew in another --federation folder",
        )
    yield from _check_folder("runs", runs, "name another folder with --runs")
    tasks: list[Task] = []
    yield from _check(
        "task", lambda: tasks.append(_make(task, config)), lambda _: "it can be made", _TASK_ADVICE
    )
    if tasks:
        yield from _check(
            "model",
            lambda: Trainer(tasks[0]),
            lambda trainer: _size(trainer, devices.use(device)),
            "mend Task.model",
        )


_TASK_ADVICE = "mend the task at the line that is named"


def _check_task(
    source: Callable[[], TaskSource],
    config: dict[str, Any] | None,
    device: str | None,
    partition_id: int,
    num_partitions: int | None,
) -> Iterator[Finding]:
    steps: dict[str, Any] = {}

    def make() -> None:
        steps["device"] = devices.use(device)
        steps["task"] = _make(source, config)

    def load() -> str:
        data = batches.load(steps["task"], partition_id, num_partitions)
        schema = _schema(data)
        steps["data"] = data
        return schema

    def look() -> str:
        _check_values(steps["data"])
        steps["values"] = True
        return "all are finite"

    def train() -> str:
        trainer = steps["trainer"] = Trainer(steps["task"])
        mx.reset_peak_memory()
        start = time.monotonic()
        parameters, statistics = trainer.parameters(), trainer.statistics()
        settings = {**steps["task"].config, "server-round": 1, "local-steps": 1}
        update = trainer.train(parameters, statistics, steps["data"], settings)
        seconds = time.monotonic() - start
        losses = {k: v for k, v in update.metrics.items() if "loss" in k}
        if not all(math.isfinite(float(loss)) for loss in losses.values()):
            raise _Fault(
                f"the loss of the first step is {next(iter(losses.values()))}",
                "look for values that are not finite in the data, or try a smaller learning rate",
            )
        steps["peak"] = mx.get_peak_memory()
        return f"one step took {seconds:.1f} s on {steps['device']}"

    yield from _check("task", make, lambda _: "it can be made", _TASK_ADVICE)
    if "task" in steps:
        yield from _check("data", load, str, "mend Task.data at the line that is named")
    if "data" in steps:
        yield from _check("values", look, str, "mend the data")
    if "values" in steps:
        yield from _check("training", train, str, _TASK_ADVICE)
    if "peak" in steps:
        yield from _check("memory", lambda: _memory(steps["peak"]), str, "end other programs")


def _check(
    name: str, run: Callable[[], Any], describe: Callable[[Any], str], advice: str
) -> Iterator[Finding]:
    """The finding of one check; an exception is a fault."""
    try:
        result = run()
        yield Finding(name, describe(result))
    except _Fault as fault:
        yield Finding(name, str(fault), fault.advice, True)
    except Exception as error:
        from ..tracebacks import location

        prefix = "" if isinstance(error, FedError) else f"{type(error).__name__}: "
        line = location(error)
        where = f" ({line[0]}, line {line[1]})" if line else ""
        yield Finding(name, f"{prefix}{error}{where}", advice, True)


def _identity(
    server: str | None,
    token: str | None,
    folder: Path | None,
    root_certificates: Path | None,
    key: Path | None,
) -> Identity:
    if token is not None:
        return from_token(token, server, folder)
    return from_files(str(server), root_certificates, key)


def _describe(identity: Identity) -> str:
    name = f" as {identity.name}" if identity.name else ""
    return f"for {address.join(identity.host, identity.port)}{name}"


def _check_server(identity: Identity) -> Iterator[Finding]:
    """Reachability, certificate, key and clock, by a request that changes nothing."""
    where = address.join(identity.host, identity.port)

    def ask() -> str:
        proxy = identity.proxy
        client = FleetClient(
            identity.host, identity.port, identity.context, identity.key, None, proxy
        )
        try:
            client.heartbeat()
        except UntrustedServer as error:
            raise _Fault(
                f"{where} is not the server that this node trusts: {error}",
                "ask for a token of the server as it is set up now; or somebody is in between",
            ) from error
        except ClockDiffers as error:
            raise _Fault(str(error), "turn on the setting of the clock by the network") from error
        except Unreachable as error:
            raise _Fault(
                f"no answer from {where}: {error}",
                "start the server, or mend the address, the firewall or the network between",
            ) from error
        except RequestRefused as refusal:
            if refusal.denial == REVOKED:
                raise _Fault(str(refusal), "ask the server's operator for a new token") from refusal
            if refusal.denial == UNKNOWN and identity.invitation is None:
                raise _Fault(
                    str(refusal), "have the key added on the server: mlx-fed nodes add NAME --key"
                ) from refusal
        except certificates.CertificateError as error:
            raise _Fault(str(error), "ask for a new token") from error
        return f"{where} answers"

    def ask_in_time() -> str:
        # Each byte of an answer may take seconds: what is in the server's place may have no end.
        results: list[str | Exception] = []
        thread = Thread(target=lambda: results.append(_result_of(ask)), daemon=True)
        thread.start()
        thread.join(_LONGEST_ANSWER)
        if not results:
            raise _Fault(
                f"no whole answer from {where} within {_LONGEST_ANSWER:.0f} seconds",
                "start the server, or mend the address, the firewall or the network between",
            )
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    yield from _check("server", ask_in_time, str, "mend the address or the network")


def _result_of(function: Callable[[], str]) -> str | Exception:
    try:
        return function()
    except Exception as error:
        return error


def _make(source: Callable[[], TaskSource], config: dict[str, Any] | None) -> Task:
    task_source = source()
    settings = TracedConfig.of(config)
    task = make_task(task_source, settings)
    check_config(settings, task, [] if isinstance(task_source, Task) else [task_source])
    return task


def _schema(data: Data) -> str:
    parts = []
    for name, split in (("train", data.train), ("test", data.test)):
        if split is None:
            parts.append(f"{name}: none")
        elif callable(split):
            parts.append(f"{name}: a stream")
        else:
            count = examples.count(split)
            if name == "train" and not count:
                raise _Fault("Data.train has no examples", "choose another partition or dataset")
            arrays = ", ".join(
                f"{tuple(array.shape[1:])} {str(array.dtype).removeprefix('mlx.core.')}"
                for array in examples.leaves(split)
            )
            parts.append(f"{name}: {count} examples of {arrays}")
    return "; ".join(parts)


def _check_values(data: Data) -> None:
    for name, split in (("train", data.train), ("test", data.test)):
        if split is None or callable(split):
            continue
        for path, array in examples.paths(split):
            if not mx.issubdtype(array.dtype, mx.inexact):
                continue
            rows = ~mx.isfinite(array.reshape(len(array), -1)).all(axis=1)
            wrong = np.flatnonzero(np.asarray(rows))
            if len(wrong):
                raise _Fault(
                    f"Data.{name}, array {path}: {len(wrong)} of {len(array)} examples have "
                    f"values that are not finite, the first at {wrong[0]}",
                    "leave these examples out, or fill in their missing values",
                )


def _memory(peak: int) -> str:
    total = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if hasattr(mx, "device_info") and mx.default_device().type == mx.gpu:
        total = int(mx.device_info().get("memory_size", total))
    text = f"a step needs {peak / 2**20:.1f} MiB of {total / 2**30:.1f} GiB"
    if peak > (1 - _SPARE_SHARE) * total:
        raise _Fault(f"{text}, which leaves too little", "choose a smaller batch-size or model")
    return text


def _check_folder(name: str, folder: Path, advice: str) -> Iterator[Finding]:
    def write() -> str:
        parent = folder.expanduser()
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"0" * 2**16)
            file.flush()
        free = shutil.disk_usage(parent).free
        if free < _SPARE_DISK:
            raise _Fault(f"{parent} has {free / 2**20:.0f} MiB free", f"make room, or {advice}")
        return f"{folder} can be written, {free / 2**30:.1f} GiB free"

    yield from _check(name, write, str, advice)


def _resolve(announce: str) -> str:
    host, port = address.parse(announce)
    addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port)})
    local = set(certificates.local_addresses("0.0.0.0"))
    loopback = [entry for entry in addresses if address.is_loopback(entry)]
    if loopback and not address.is_loopback(host):
        raise _Fault(
            f"{host} is {', '.join(addresses)} here, which other machines cannot reach",
            "announce this machine's address on its network",
        )
    warning = (
        "" if local & {host, *addresses} else ": no address of this machine, perhaps a router's"
    )
    return f"{announce} is {', '.join(addresses)}{warning}"


def _certificates(folder: Path) -> str:
    federation = Federation(folder)
    federation.context("127.0.0.1")
    certificate = x509.load_pem_x509_certificate(federation.certificate.read_bytes())
    remaining_time = certificate.not_valid_after_utc - datetime.now(UTC)
    if remaining_time.total_seconds() <= 0:
        raise _Fault(
            f"the server's certificate ended on {certificate.not_valid_after_utc:%Y-%m-%d}",
            "renew it: mlx-fed certs bring",
        )
    return f"{folder} has an authority, and a certificate for {remaining_time.days} days"


def _size(trainer: Trainer, device: str) -> str:
    size = sum(array.nbytes for array in trainer.parameters().values())
    return f"{size / 2**20:.1f} MiB of parameters, aggregated on {device}"
