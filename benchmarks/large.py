"""Seconds and memory of a federated round of a large model, beside stock Flower.

    python benchmarks/large.py [--rounds 4] [--only two|fifty|flower] [--json]

Weights change in every round and nothing is trained (see ``large_app``), on the loopback:

- ``two``: a float32 model of 400 MB and two nodes, by ``mlx_fed.serve`` and ``mlx_fed.join``; and
  one of 100 MB with checkpoints and without.
- ``flower``: the same 400 MB on a stock SuperLink and two stock SuperNodes.
- ``fifty``: 50 nodes that each reply with 100 MB, one process playing them all; beside it, what
  our checks and sums take for as many replies that wait on disk already, and Flower's FedAvg to
  average them in memory.

Memory is the peak of what is resident, of a SuperLink or SuperNode with the processes that they
start, which is looked at four times a second. The targets: 4 s a train phase and three times the
model on the server; for 50 replies no slower than Flower's average; a checkpoint below 5 % of a
round, checking below 10 % of aggregating.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core: on Linux it brings a fast BLAS

import mlx.core as mx
import numpy as np
import superlink
from federation import free_port, together
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from large_app.app import Still, task

_RUNS = Path("runs")
"""On disk, which the system's temporary folder need not be."""
_CHUNK = 2 * 2**20
"""Bytes of an array that Flower sends at once."""
QUIET = {"listener": lambda event: None}


class Memory:
    """The peak of the resident memory of processes and of all that they start, in bytes.

    Attributes:
        peak (dict): By the processes' names.
    """

    def __init__(self, processes: dict[str, int]):
        self.processes = processes
        self.peak = dict.fromkeys(processes, 0)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            listed = subprocess.run(
                ["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True
            ).stdout
            rows = {int(p): (int(q), int(r)) for p, q, r in map(str.split, listed.splitlines())}
            for name, pid in self.processes.items():
                family = {pid}
                grown = True
                while grown:
                    more = {p for p, (parent, _) in rows.items() if parent in family} - family
                    family |= more
                    grown = bool(more)
                resident = 1024 * sum(rows[p][1] for p in family if p in rows)
                self.peak[name] = max(self.peak[name], resident)


def own_peak() -> int:
    """The peak of this process's resident memory, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def server(port: int, megabytes: int, rounds: int, nodes: int, keep: int) -> dict:
    """Each round's seconds from its beginning to its end, its record, and the peak of memory."""
    ends: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            ends.append(time.perf_counter())

    _RUNS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="large-", dir=_RUNS) as runs:
        result = fed.serve(
            task,
            FedAvg(fraction_evaluate=0.0, min_available_nodes=nodes, min_train_nodes=nodes),
            num_rounds=rounds,
            port=port,
            runs=runs,
            min_nodes=nodes,
            keep=keep,
            config={"megabytes": megabytes},
            listeners=(listen,),
        )
    return {
        # A round that follows another begins where that ended: sending is a part of it.
        "walls": [end - begin for begin, end in pairwise(ends)],
        "records": [record["seconds"] for record in result.rounds],
        "peak": own_peak(),
    }


def node(port: int, megabytes: int, partition: int) -> int:
    from mlx_fed import clientapp

    clientapp.Trainer = Still
    fed.join(
        task,
        f"127.0.0.1:{port}",
        partition_id=partition,
        device="cpu",
        config={"megabytes": megabytes},
        **QUIET,
    )
    return own_peak()


def crowd(port: int, megabytes: int, size: int) -> None:
    """Many nodes in one process, which work one after another."""
    from flwr.app import Context
    from mlx_fed import clientapp
    from mlx_fed.flower.fleet_client import FleetClient
    from mlx_fed.flower.transport import Unreachable

    clientapp.Trainer = Still
    app = clientapp.client_app(lambda config: task({"megabytes": megabytes}))
    turn = threading.Lock()

    def play(partition: int) -> None:
        client = FleetClient("127.0.0.1", port)
        while True:
            try:
                client.register()
                break
            except Unreachable:  # the server is not up yet
                time.sleep(0.2)
        beating = threading.Event()

        def beat() -> None:
            while not beating.wait(2.0):
                client.heartbeat()

        threading.Thread(target=beat, daemon=True).start()
        context = Context(1, client.node_id, {"partition-id": partition}, RecordDict(), {})
        while not client.outcome:
            message = client.receive()
            if message is not None:
                with turn:
                    reply = app(message, context)
                    del message
                    client._held = {}
                    client.send(reply, 0.0)
                    del reply
        beating.set()
        client.leave()

    players = [threading.Thread(target=play, args=(number,)) for number in range(size)]
    for player in players:
        player.start()
    for player in players:
        player.join()


def _sent(megabytes: int, replies: int) -> Iterator[list[np.ndarray]]:
    """The arrays of each reply."""
    rng = np.random.default_rng(0)
    arrays = [rng.random(megabytes * 1_000_000 // 80, dtype=np.float32) for _ in range(20)]
    for number in range(replies):
        yield [array + np.float32(number) for array in arrays]


def flowers_average(megabytes: int, replies: int) -> float:
    """Seconds that Flower takes to average replies that it has in memory."""
    contents = []
    for number, arrays in enumerate(_sent(megabytes, replies)):
        record = ArrayRecord({str(n): Array(array) for n, array in enumerate(arrays)})
        contents.append(
            RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": number + 1})})
        )
    started = time.perf_counter()
    aggregate_arrayrecords(contents, "num-examples")
    return time.perf_counter() - started


def our_average(megabytes: int, replies: int) -> dict[str, float]:
    """Seconds that our server takes for as many replies, once it has them and nothing else to do.

    They are checked and summed from the disk on which they wait.
    """
    from mlx_fed.rounds import checks, messages
    from mlx_fed.system import memory
    from mlx_fed.arrays import named_arrays, spool, weighted_mean

    memory.retain_freed_memory()
    seconds = dict.fromkeys(("checked", "summed"), 0.0)
    with tempfile.TemporaryDirectory(prefix="large-", dir=_RUNS) as folder:
        place = spool.Spool(Path(folder))

        def waiting(array: Array) -> Array:
            data, parts = array.data, []
            for start in range(0, len(data), _CHUNK):
                chunk = data[start : start + _CHUNK]
                parts.append(spool.Segment(place.put(chunk)))
            return spool.SegmentedArray(array.dtype, array.shape, array.stype, tuple(parts))

        came = []
        for arrays in _sent(megabytes, replies):
            named = {str(n): mx.array(array) for n, array in enumerate(arrays)}
            record = messages.pack(named)
            came.append(ArrayRecord({name: waiting(array) for name, array in record.items()}))
        spec = named_arrays.spec(named)
        for _ in range(2):  # the memory that a run takes in its first round serves in all
            began = time.perf_counter()
            fit = [checks.check_arrays(record, spec, True, 1.0) for record in came]
            seconds["checked"] = time.perf_counter() - began
            began = time.perf_counter()
            updates = (
                (weighted_mean.Counted(number, number + 1.0, {}), arrays, {})
                for number, arrays in enumerate(fit)
            )
            total = weighted_mean.in_order(weighted_mean.blocks(updates, replies))
            for _ in total.mean().parameters.values():
                pass
            seconds["summed"] = time.perf_counter() - began
            del total
    return seconds


def two(megabytes: int, rounds: int, keep: int = 3) -> dict:
    port = free_port()
    served, *nodes = together(
        partial(server, port, megabytes, rounds, 2, keep),
        *(partial(node, port, megabytes, partition) for partition in range(2)),
    )
    return {**served, "seconds": statistics.median(served["walls"]), "node": max(nodes)}


def fifty(megabytes: int, rounds: int, size: int) -> dict:
    port = free_port()
    served, _ = together(
        partial(server, port, megabytes, rounds, size, 0), partial(crowd, port, megabytes, size)
    )
    return {**served, "seconds": statistics.median(served["walls"])}


def flower(megabytes: int, rounds: int) -> dict:
    watching: list[Memory] = []
    with (
        tempfile.TemporaryDirectory() as name,
        superlink.federation(Path(name), 2, lambda pids: watching.append(Memory(pids))) as run,
    ):
        app = Path(__file__).parent / "large_app"
        phases = run(app, {"num-rounds": rounds, "megabytes": megabytes}, 120 + 120 * rounds)
        peak = watching[0].close()
    return {
        "seconds": statistics.median(end - begin for begin, end in phases[1:]),
        "peak": peak.pop("superlink"),
        "node": max(peak.values()),
    }


def row(what: str, megabytes: int, result: dict) -> str:
    times = result["peak"] / megabytes / 1e6
    node = f"{result['node'] / 1e9:9.2f}" if "node" in result else f"{'':9}"
    return f"{what:34}{result['seconds']:9.2f}{result['peak'] / 1e9:9.2f}{times:9.2f}{node}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help="rounds, the first not counted")
    parser.add_argument("--megabytes", type=int, default=400, help="of the large model")
    parser.add_argument("--crowd", type=int, default=50, help="nodes of the smaller model")
    parser.add_argument("--only", choices=("two", "flower", "fifty"))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    wanted = (arguments.only,) if arguments.only else ("two", "flower", "fifty")
    large, small = arguments.megabytes, arguments.megabytes // 4
    found: dict[str, dict] = {}
    if "two" in wanted:
        found["two"] = two(large, arguments.rounds)
        found["small"] = two(small, 2 * arguments.rounds)
        found["unkept"] = two(small, 2 * arguments.rounds, keep=0)
    if "flower" in wanted:
        found["flower"] = flower(large, max(2, arguments.rounds - 1))
    if "fifty" in wanted:
        found["fifty"] = fifty(small, 2, arguments.crowd)
        found["alone"] = our_average(small, arguments.crowd)
        found["average"] = {"seconds": flowers_average(small, arguments.crowd)}
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    print(f"{'':34}{'s a phase':>9}{'server GB':>10}{'x model':>9}{'node GB':>9}\n")
    names = {
        "two": (f"mlx-fed, {large} MB, 2 nodes", large),
        "flower": (f"SuperLink, {large} MB, 2 SuperNodes", large),
        "small": (f"mlx-fed, {small} MB, 2 nodes", small),
        "unkept": (f"mlx-fed, {small} MB, no checkpoints", small),
        "fifty": (f"mlx-fed, {small} MB, {arguments.crowd} replies", small),
    }
    for key, (what, size) in names.items():
        if key in found:
            print(row(what, size, found[key]))
    if "fifty" in found:
        seconds, alone = found["fifty"]["records"][-1], found["alone"]
        print(f"\n{arguments.crowd} replies of {small} MB, in seconds:")
        print("  by themselves:", ", ".join(f"{what} {s:.2f}" for what, s in alone.items()))
        print(f"  Flower's average {found['average']['seconds']:.2f}")
        print("  while others are received:", end=" ")
        print(f"checked {seconds['check']:.2f}, summed {seconds['aggregate']:.2f}")


if __name__ == "__main__":
    main()
