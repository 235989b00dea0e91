"""Draws tasks and holds the simulation to the oracle, for as long as one likes.

python -m tests.generated --minutes 60
python -m tests.generated --seed 123
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import time
from collections import Counter

from .compare import Report, check, extras
from .draw import Drawn, draw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="This task alone.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--first", type=int, default=0, help="The first seed.")
    parser.add_argument("--tasks", type=int, help="How many, whatever the time.")
    options = parser.parse_args()
    faulthandler.enable()
    if options.seed is not None:
        drawn = draw(options.seed)
        print(drawn)
        show(options.seed, check(drawn, **extras(options.seed)))
        return
    began, counts, failed = time.monotonic(), Counter[str](), []
    for seed in itertools.count(options.first):
        done = seed - options.first
        over = time.monotonic() - began > options.minutes * 60
        if over if options.tasks is None else done == options.tasks:
            break
        drawn = draw(seed)
        report = check(drawn, **extras(seed))
        counts.update(features_of(drawn, report))
        if report.faults:
            failed.append(seed)
            show(seed, report)
    print(f"\n{sum(counts[kind] for kind in ('useful', 'useless'))} tasks")
    for name, count in sorted(counts.items()):
        print(f"  {name}: {count}")
    print(f"{len(failed)} failed: {failed}")
    raise SystemExit(bool(failed))


def show(seed: int, report: Report) -> None:
    """Prints the faults of a task, a few of each engine."""
    if report.useless:
        print(f"seed {seed}: no use, {report.useless}")
    for where, faults in itertools.groupby(report.faults, lambda fault: fault.where):
        several = list(faults)
        for fault in several[:2]:
            print(f"seed {seed}: {where}: {fault.what}", flush=True)
        if len(several) > 2:
            print(f"seed {seed}: {where}: and {len(several) - 2} more", flush=True)


def features_of(drawn: Drawn, report: Report) -> list[str]:
    """What to count of a task."""
    features = drawn.features
    names = ["useless" if report.useless else "useful"]
    names += ["trained many at once"] if report.batched else []
    names += [f"{key} {features[key]}" for key in ("loss", "optimizer", "strategy", "model dtype")]
    for key in ("structure", "stream", "train step", "buffers", "personal", "augment"):
        names += [f"{key} {features[key]}"] if features.get(key) else []
    for key in ("keep_optimizer", "max_grad_norm", "loss of config", "one label a client"):
        names += [key] if features.get(key) else []
    for key in ("layers", "encoders"):
        names += [f"{key} {name}" for name in sorted(set(features[key]))]
    return names


if __name__ == "__main__":
    main()
