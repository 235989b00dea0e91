"""Checks of a node or a server before a run: each finds one kind of fault and has its remedy.

``mlx-fed check`` prints them. A check that cannot be made because of an earlier fault is left out.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any

from cryptography import x509

from ..flower.allowlist import REVOKED, UNKNOWN
from ..flower.fleet_client import FleetClient
from ..flower.transport import ClockDiffers, RequestRefused, Unreachable, UntrustedServer
from ..system import address, devices, http
from ..task import Task, TaskSource
from ..training.trainer import Trainer
from . import certificates
from .federation import Federation
from .findings import Fault, Finding, check
from .identity import Identity, from_files, from_token
from .policy_file import load_policy
from .task_preflight import TASK_ADVICE, build_task, check_task, describe_size

_SPARE_DISK = 256 * 2**20
_LONGEST_ANSWER = 30.0
"""Seconds for a server's answer."""


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
        yield from check(
            "identity",
            lambda: identities.append(_identity(server, token, identity, root_certificates, key)),
            lambda _: _describe(identities[0]),
            "ask the server's operator for a new token, or name the right files",
        )
    if identities:
        partition_id = identities[0].number if partition_id is None else partition_id
        yield from _check_server(identities[0])
    if policy is not None:
        yield from check(
            "policy",
            lambda: load_policy(policy),
            lambda _: f"{policy} can be read",
            "mend the file",
        )
    if identities and policy is not None:
        where = address.join(identities[0].host, identities[0].port)
        yield from check(
            "policy",
            lambda: load_policy(policy).check_server(where),
            lambda _: f"it allows {where}",
            "add the server to `allowed` in [server] of the policy, if it is the right one",
        )
    yield from _check_folder("temporary files", Path(tempfile.gettempdir()), "set TMPDIR")
    yield from check_task(task, config, device, partition_id or 0, num_partitions)


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
    yield from check(
        "port",
        lambda: http.listen(host, port).close(),
        lambda _: f"{address.join(host, port)} is free",
        "end what listens there, or choose another --host or --port",
    )
    if announce is not None:
        yield from check(
            "address", lambda: _resolve(announce), str, "announce an address that nodes can reach"
        )
    if (federation / "ca.crt").exists():
        yield from check(
            "certificates",
            lambda: _certificates(federation),
            str,
            "put the files right, or make them anew in another --federation folder",
        )
    yield from _check_folder("runs", runs, "name another folder with --runs")
    tasks: list[Task] = []
    yield from check(
        "task",
        lambda: tasks.append(build_task(task, config)),
        lambda _: "it can be made",
        TASK_ADVICE,
    )
    if tasks:
        yield from check(
            "model",
            lambda: Trainer(tasks[0]),
            lambda trainer: describe_size(trainer, devices.use(device)),
            "mend Task.model",
        )


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
            raise Fault(
                f"{where} is not the server that this node trusts: {error}",
                "ask for a token of the server as it is set up now; or somebody is in between",
            ) from error
        except ClockDiffers as error:
            raise Fault(str(error), "turn on the setting of the clock by the network") from error
        except Unreachable as error:
            raise Fault(
                f"no answer from {where}: {error}",
                "start the server, or mend the address, the firewall or the network between",
            ) from error
        except RequestRefused as refusal:
            if refusal.denial == REVOKED:
                raise Fault(str(refusal), "ask the server's operator for a new token") from refusal
            if refusal.denial == UNKNOWN and identity.invitation is None:
                raise Fault(
                    str(refusal), "have the key added on the server: mlx-fed nodes add NAME --key"
                ) from refusal
        except certificates.CertificateError as error:
            raise Fault(str(error), "ask for a new token") from error
        return f"{where} answers"

    def ask_in_time() -> str:
        # Each byte of an answer may take seconds: what is in the server's place may have no end.
        results: list[str | Exception] = []
        thread = Thread(target=lambda: results.append(_result_of(ask)), daemon=True)
        thread.start()
        thread.join(_LONGEST_ANSWER)
        if not results:
            raise Fault(
                f"no whole answer from {where} within {_LONGEST_ANSWER:.0f} seconds",
                "start the server, or mend the address, the firewall or the network between",
            )
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    yield from check("server", ask_in_time, str, "mend the address or the network")


def _result_of(function: Callable[[], str]) -> str | Exception:
    try:
        return function()
    except Exception as error:
        return error


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
            raise Fault(f"{parent} has {free / 2**20:.0f} MiB free", f"make room, or {advice}")
        return f"{folder} can be written, {free / 2**30:.1f} GiB free"

    yield from check(name, write, str, advice)


def _resolve(announce: str) -> str:
    host, port = address.parse(announce)
    addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port)})
    local = set(certificates.local_addresses("0.0.0.0"))
    loopback = [entry for entry in addresses if address.is_loopback(entry)]
    if loopback and not address.is_loopback(host):
        raise Fault(
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
        raise Fault(
            f"the server's certificate ended on {certificate.not_valid_after_utc:%Y-%m-%d}",
            "renew it: mlx-fed certs bring",
        )
    return f"{folder} has an authority, and a certificate for {remaining_time.days} days"
