"""Flower's simulation engine, on Ray.

In-process, by ``run_simulation``, which spares it the SuperLink that ``flwr run`` starts. A client
takes one core, where Flower's default is two.
"""

import logging
import os
import sys
import tempfile

home = tempfile.TemporaryDirectory()
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
os.environ |= {"FLWR_HOME": home.name, "RAY_USAGE_STATS_ENABLED": "0", "WORKLOAD": sys.argv[1]}

# Below, since Flower reads its settings when it is imported.
from flower_app import client_app, clock, server_app, workload  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run_simulation(
        server_app,
        client_app,
        num_supernodes=workload.num_clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"logging_level": logging.ERROR, "log_to_driver": False},
        },
    )
    clock.report()


if __name__ == "__main__":
    main()
