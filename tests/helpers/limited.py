"""A simulation that the system kills in the middle of a file: ``limited.py RUNS ROUND BYTES``.

After the round, no file may grow beyond so many bytes, and the write that would make one does ends
the process at that byte. It goes on with the run where there is one.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

from mlx_fed import events
import mlx_fed as fed  # before mlx.core

from flwr.serverapp.strategy import FedAdam

from .tasks import moons


def main() -> None:
    runs, number, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python would go on with an error

    def limit(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished) and event.record["round"] == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    place = {"resume": "run"} if (runs / "run").exists() else {"name": "run"}
    fed.simulate(
        moons,
        FedAdam(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1),
        4,
        ROUNDS,
        workers=0,
        runs=runs,
        listeners=(limit,),
        **place,
    )


ROUNDS = 6

if __name__ == "__main__":
    main()
