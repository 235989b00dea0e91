"""The same task under stock Flower: `flwr run` in simulation and on SuperLink and SuperNodes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx_fed  # noqa: F401, before mlx.core

import mlx.core as mx
import numpy as np
import pytest

from mlx_fed.fleet.federation import Federation
from mlx_fed.fleet.identity import make_key

from ..conftest import ROOT, free_port
from ..generated.compare import simulate, to_float
from ..generated.draw import draw, of_processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MNIST = ROOT / "examples" / "mnist"
ROUNDS = 2


def command(name: str) -> Path:
    """One of Flower's commands, from the environment that the tests run in."""
    return Path(sys.executable).with_name(name)


class SuperLink:
    """A stock SuperLink in a folder of its own, what is run on it, and who joins it."""

    def __init__(
        self, start: Callable, folder: Path, *options: str, certificates: Federation | None = None
    ):
        folder.mkdir()
        self.start, self.folder = start, folder
        self.address = f"127.0.0.1:{free_port()}"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = {
            "PATH": path,  # its commands start others by name
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
        }
        (folder / "flwr").mkdir()
        trust, encryption = "insecure = true", ["--insecure"]
        if certificates is not None:
            certificates.context("127.0.0.1")
            trust = f'root-certificates = "{certificates.authority}"'
            encryption = ["--ssl-ca-certfile", certificates.authority]
            encryption += ["--ssl-certfile", certificates.certificate]
            encryption += ["--ssl-keyfile", certificates.key]
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n'
            f'[superlink.here]\naddress = "{self.address}"\n{trust}\n'
        )
        host, port = self.address.split(":")
        self.started = [
            self._command("flower-superlink", *encryption, "--host", host, "--port", port, *options)
        ]
        self.started[0].line("Uvicorn running")

    def _command(self, name: str, *arguments: object):
        return self.start(command(name), *arguments, cwd=self.folder, **self.env)

    def supernode(self, *options: str):
        node = self._command(
            "flower-supernode",
            "--insecure",
            "--superlink",
            self.address,
            "--port",
            free_port(),
            *options,
        )
        self.started.append(node)
        return node

    def run(self, app: Path, settings: str = "", *options: str) -> str:
        """What `flwr run --stream` shows, up to the end of the run."""
        overrides = ["--run-config", settings, *options] if settings else [*options]
        run = self._command("flwr", "run", app, *overrides, "--stream")
        assert run.ends(150) == 0, run.text
        return run.text

    def end(self) -> None:
        """Ends Flower's processes as Ctrl-C would, nodes first: they end those they started."""
        for started in reversed(self.started):
            started.process.send_signal(signal.SIGINT)
            try:
                started.process.wait(15)
            except subprocess.TimeoutExpired:
                started.end()


@pytest.fixture
def superlink(start, tmp_path) -> Iterator[Callable[..., SuperLink]]:
    """Starts a SuperLink with these options."""
    links: list[SuperLink] = []

    def begin(*options: str, certificates: Federation | None = None) -> SuperLink:
        folder = tmp_path / f"superlink-{len(links)}"
        links.append(SuperLink(start, folder, *options, certificates=certificates))
        return links[-1]

    yield begin
    for link in links:
        link.end()


@pytest.fixture
def simulation(superlink) -> SuperLink:
    """What `flwr run` starts by itself, but with an end."""
    pytest.importorskip("ray", reason="needs the extra simulation")
    return superlink("--simulation")


def join(start, address: str, node_id: int, *options: object):
    """A resident node of ours."""
    where = ("--server", address, "--node-id", node_id, "--num-partitions", 2, "--wait", 60)
    return start("-m", "mlx_fed", "join", "examples.mnist:task", *where, *options)


def fleet_model(start, tmp_path: Path) -> str:
    """The model that a federation of our own ends with."""
    where = ("--port", 0, "--runs", tmp_path, "--name", "fleet", "--rounds", ROUNDS)
    server = start("-m", "mlx_fed", "serve", "examples.mnist:task", *where)
    address = server.line(r"Server ready on (\S+)").group(1)
    nodes = [join(start, address, number) for number in range(2)]
    assert [process.ends() for process in (server, *nodes)] == [0, 0, 0], server.text
    return model(tmp_path / "fleet")


def model(run: Path) -> str:
    """A hash of a run's model: bytes that differ would fill a page."""
    return hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()


def history(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def new_app(start, folder: Path, name: str) -> Path:
    init = start("-m", "mlx_fed", "init", name, cwd=folder)
    assert init.ends() == 0, init.text
    return folder / name


def changed_app(start, folder: Path, *changes: tuple[str, str], settings: str = "") -> Path:
    """An app as `mlx-fed init` writes it, changed here and there."""
    app = new_app(start, folder, "changed")
    code = (app / "changed.py").read_text()
    for old, new in changes:
        assert old in code
        code = code.replace(old, new)
    (app / "changed.py").write_text(code)
    with (app / "pyproject.toml").open("a") as file:
        file.write(settings)
    return app


# -- one seed, one result ----------------------------------------------------------------------


def test_flowers_simulation_ends_with_the_fleets_bits(start, tmp_path, simulation):
    shown = simulation.run(MNIST, f'num-rounds={ROUNDS} name="simulated"')
    run = simulation.folder / "runs" / "simulated"
    assert f"The run's folder: {run}" in shown
    assert model(run) == fleet_model(start, tmp_path)


def test_flowers_simulation_ends_with_our_simulations_bits(start, tmp_path, simulation):
    clients = 20  # of more than one block of sums
    settings = f'num-rounds={ROUNDS} name="rays"'
    simulation.run(MNIST, settings, "--federation-config", f"num-supernodes={clients}")
    where = ("--rounds", ROUNDS, "--clients", clients, "--runs", tmp_path, "--name", "ours")
    ours = start("-m", "mlx_fed", "simulate", "examples.mnist:task", *where, "--workers", 2)
    assert ours.ends() == 0, ours.text
    rays = simulation.folder / "runs" / "rays"
    assert len(history(rays)[-1]["train"]["nodes"]) == clients
    assert model(rays) == model(tmp_path / "ours")
    for one, other in zip(history(rays), history(tmp_path / "ours"), strict=True):
        assert one["train"] == other["train"]
        assert one["evaluate"] == other["evaluate"]


def test_a_stock_superlink_and_supernodes_end_with_the_fleets_bits(start, tmp_path, superlink):
    link = superlink()
    for number in range(2):
        link.supernode("--node-config", f"partition-id={number} num-partitions=2")
    link.run(MNIST, f'num-rounds={ROUNDS} name="stock"')
    assert model(link.folder / "runs" / "stock") == fleet_model(start, tmp_path)


def test_our_nodes_on_a_stock_superlink_end_with_the_fleets_bits_and_go(start, tmp_path, superlink):
    link = superlink()
    nodes = [join(start, link.address, number) for number in range(2)]
    link.run(MNIST, f'num-rounds={ROUNDS} name="ours"')
    assert [node.ends() for node in nodes] == [0, 0]
    assert all("The run is over." in node.text for node in nodes)
    assert model(link.folder / "runs" / "ours") == fleet_model(start, tmp_path)


def test_our_nodes_on_a_stock_superlink_that_encrypts_and_asks_for_keys(start, tmp_path, superlink):
    certificates = Federation(tmp_path / "certificates", "127.0.0.1:1")
    link = superlink("--enable-supernode-auth", certificates=certificates)
    trusted = ("--root-certificates", certificates.authority)
    nodes = []
    for number in range(2):
        key = tmp_path / f"{number}.key"
        make_key(key)
        registered = link._command("flwr", "supernode", "register", key.with_suffix(".pub"))
        assert registered.ends() == 0, registered.text
        nodes.append(join(start, link.address, number, *trusted, "--key", key))
    make_key(tmp_path / "unknown.key")
    unknown = join(start, link.address, 0, *trusted, "--key", tmp_path / "unknown.key")
    assert unknown.ends() == 1
    assert "refused this node" in unknown.text
    link.run(MNIST, f'num-rounds={ROUNDS} name="ours"')
    assert [node.ends() for node in nodes] == [0, 0]
    assert len(history(link.folder / "runs" / "ours")) == ROUNDS


@pytest.mark.parametrize("seed", of_processes(3))
def test_a_generated_task_ends_with_our_simulations_bits(seed, start, tmp_path, simulation):
    drawn = draw(seed)
    app = new_app(start, tmp_path, "generated")
    (app / "generated.py").write_text(GENERATED.format(seed=seed))
    clients = f"num-supernodes={drawn.num_clients}"
    settings = f'num-rounds={drawn.num_rounds} seed={drawn.seed} name="run"'
    simulation.run(app, settings, "--federation-config", clients)
    arrays = mx.load(str(simulation.folder / "runs" / "run" / "model.safetensors"))
    expected = simulate(drawn, tmp_path, "plain", batched=False).values.arrays
    for name, array in expected.items():
        np.testing.assert_array_equal(to_float(arrays[name]), array, err_msg=name)


GENERATED = """
import mlx_fed as fed

from tests.generated.draw import draw

drawn = draw({seed})
client_app = fed.client_app(drawn.task)
server_app = fed.server_app(
    drawn.task,
    lambda config: drawn.strategy(),
    min_nodes=drawn.num_clients,
    config=drawn.config,
)
"""


# -- what a person sees ------------------------------------------------------------------------


def test_a_new_app_runs_and_shows_a_line_a_round(start, tmp_path, simulation):
    shown = simulation.run(new_app(start, tmp_path, "my_app"))
    rounds = [line for line in shown.splitlines() if " round " in line]
    assert len(rounds) == 3, shown
    assert all("train loss" in line and "accuracy" in line for line in rounds)
    assert "configure_train" not in shown
    (run,) = (simulation.folder / "runs").iterdir()
    assert f"The model: {run / 'model.safetensors'}" in shown


def test_a_simulated_client_without_data_is_named_and_the_run_goes_on(start, tmp_path, simulation):
    missing = "    if partition_id == 1:\n        raise OSError('the disk is not mounted')\n"
    changed = ("    rng = np", f"{missing}    rng = np")
    shown = simulation.run(changed_app(start, tmp_path, changed, settings="min-nodes = 1\n"))
    assert re.search(
        r" node-1 refused: OSError \(\w+\.py, line \d+\): what it says stays on the node", shown
    )
    (run,) = (simulation.folder / "runs").iterdir()
    assert [record["train"]["nodes"] for record in history(run)] == 3 * [["node-0"]]


def test_when_every_client_fails_the_reason_is_shown_and_what_was_reached_is_kept(
    start, tmp_path, simulation
):
    failing = 'optim.Adam(learning_rate=0.01 if config.get("server-round") != 2 else fail())'
    shown = simulation.run(
        changed_app(
            start,
            tmp_path,
            ('optim.Adam(learning_rate=config["learning-rate"])', failing),
            ("task = ", 'def fail():\n    raise RuntimeError("no loss today")\n\n\ntask = '),
        )
    )
    for number in range(2):
        where = r"RuntimeError \(\w+\.py, line \d+\): what it says"
        assert re.search(rf"node-{number} left out of train: {where}", shown)
    assert "Round 2: all 2 nodes failed with the same error" in shown
    (run,) = (simulation.folder / "runs").iterdir()
    assert [record["round"] for record in history(run)] == [1]
    assert model(run)


def test_a_supernode_without_a_partition_is_told_how_to_get_one(start, tmp_path, superlink):
    link = superlink()
    link.supernode()
    shown = link.run(changed_app(start, tmp_path, settings="wait = 15.0\n"))
    assert "refused: ClientError: The node has no partition-id." in shown
    assert "--node-config 'partition-id=0 num-partitions=2'" in shown
    assert "0 of 2 nodes came within 15 seconds" in shown


def test_clients_with_other_frozen_arrays_are_named(start, tmp_path, simulation):
    backbone = (
        "def model() -> nn.Module:\n"
        "    back = nn.Linear(2, 8)\n"
        "    back.weight = mx.array(np.random.default_rng().normal(size=(8, 2)).astype('f4'))\n"
        "    return nn.Sequential(back.freeze(), nn.ReLU(), nn.Linear(8, 2))\n\n\n"
        "def other() -> nn.Module:\n"
    )
    changed = ("def model() -> nn.Module:\n", backbone)
    shown = simulation.run(changed_app(start, tmp_path, changed, settings="wait = 30.0\n"))
    assert "refused: its model is not the server's: frozen array 'layers.0.weight' has" in shown
    assert "0 of 2 nodes came within 30 seconds" in shown
