"""Fuzzes every entry, guided by coverage, until it is stopped or the time is up.

    pip install atheris
    python -m tests.fuzz --seconds 600 [--only NAME]

An input that fails is written to ``crash-...`` here and ends the run: give its path to try it
again.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlx_fed", "flwr.supercore.inflatable"]):
    from .entries import ENTRIES, seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--only", help="One entry's name.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", default=".", help="Where inputs that fail are written.")
    parser.add_argument("inputs", nargs="*", help="Files to try again.")
    given = parser.parse_args()
    logging.getLogger("mlx_fed").setLevel(logging.CRITICAL)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    names = [name for name in ENTRIES if given.only in (None, name)]
    counts = dict.fromkeys(names, 0)

    began = time.monotonic()

    def report() -> None:
        print(f"{sum(counts.values())} inputs in {time.monotonic() - began:.0f} s")
        for name, count in counts.items():
            print(f"  {name}: {count}")
        sys.stdout.flush()

    def one_input(data: bytes) -> None:
        if time.monotonic() - began > given.seconds and not given.inputs:
            report()
            os._exit(0)  # libFuzzer would leave no other way
        if not data:
            return
        name = names[data[0] % len(names)]
        counts[name] += 1
        ENTRIES[name](data[1:])

    corpus = Path(tempfile.mkdtemp(prefix="mlx-fed-corpus-"))
    for place, name in enumerate(names):
        for number, seed in enumerate(seeds()[name]):
            (corpus / f"{name}-{number}".replace("/", "_")).write_bytes(bytes([place]) + seed)
    flags = [f"-seed={given.seed}", "-max_len=4096"]
    flags += [
        f"-artifact_prefix={given.keep}/",
        "-timeout=25",
        "-rss_limit_mb=4096",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, *(given.inputs or [str(corpus)])], one_input)
    atexit.register(report)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
