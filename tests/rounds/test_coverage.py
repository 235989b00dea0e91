"""What would leave a client beside its update is not sent around differential privacy."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

import pytest
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, arrays_size_mod, fixedclipping_mod
from flwr.serverapp.strategy import FedAvg

from mlx_fed.errors import RunError
from mlx_fed.rounds.coverage import PrivacyError

from ..helpers.simulated import simulate
from ..helpers.federated import CLIENT, NORMALIZED, TASK, federate
from ..helpers.strategies import CLIPPING, MODS, clipped

pytestmark = pytest.mark.usefixtures("uncompiled")

LOCAL = replace(NORMALIZED, statistics="local")


class Noisy(FedAvg):
    private_noise = True


@pytest.mark.parametrize("kind", [*CLIPPING, Noisy])
def test_running_statistics_are_not_sent_around_a_strategys_noise(kind, tmp_path: Path):
    strategy = Noisy() if kind is Noisy else clipped(kind, noise=1.0)
    apps = [fed.client_app(NORMALIZED)] * 7
    with pytest.raises(PrivacyError) as raised:
        federate(strategy, tmp_path, apps, task=NORMALIZED)
    text = str(raised.value)
    assert text.startswith(f"{kind.__name__} covers the parameters alone: the model's running")
    assert "(layers.1.running_mean, layers.1.running_var) would leave each client exactly" in text
    assert 'Task.statistics="local"' in text


@pytest.mark.parametrize("kind", CLIPPING)
def test_statistics_that_stay_with_clients_are_no_matter(kind, tmp_path: Path):
    notes: list[str] = []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            notes.append(event.text)

    mods = [MODS[kind]] if kind in MODS else None
    apps = [fed.client_app(LOCAL, mods)] * 7
    strategy = clipped(kind, noise=0.1)
    result = federate(strategy, tmp_path, apps, task=LOCAL, num_rounds=1, listener=listener)
    assert len(result.rounds[0]["train"]["nodes"]) == 7
    assert notes == [
        f"{kind.__name__} covers the parameters alone: num-examples, loss, accuracy leave each "
        "client exactly, without noise"
    ]


def test_a_simulation_is_held_to_it_too(tmp_path: Path):
    with pytest.raises(PrivacyError, match="covers the parameters alone"):
        simulate(clipped(CLIPPING[0]), tmp_path, NORMALIZED, num_clients=7, num_rounds=1)


LOCAL_DP = LocalDpMod(0.1, 0.1, 1.0, 1e-5)


@pytest.mark.parametrize(
    ("mod", "name"),
    [
        (fixedclipping_mod, "fixedclipping_mod"),
        (partial(adaptiveclipping_mod), "adaptiveclipping_mod"),
        (LOCAL_DP, "LocalDpMod"),
    ],
    ids=["fixed", "adaptive", "local"],
)
def test_a_client_does_not_send_statistics_around_its_mods(mod, name: str, tmp_path: Path):
    """Whatever the server asks for."""
    apps = [fed.client_app(NORMALIZED, [arrays_size_mod, mod])] * 2
    with pytest.raises(RunError, match=rf"same error: PrivacyError: {name} covers the par"):
        federate(FedAvg(), tmp_path, apps, task=NORMALIZED, num_rounds=1, wait=0.2)


def test_a_client_with_noise_of_its_own_takes_part_without_statistics(tmp_path: Path):
    apps = [fed.client_app(LOCAL, [LOCAL_DP]), fed.client_app(LOCAL)]
    result = federate(FedAvg(), tmp_path / "local", apps, task=LOCAL, num_rounds=1)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]
    apps = [fed.client_app(TASK, [LOCAL_DP]), CLIENT]
    result = federate(FedAvg(), tmp_path / "none", apps, num_rounds=1)
    assert result.rounds[0]["train"]["nodes"] == ["node-0", "node-1"]
