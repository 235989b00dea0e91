"""Draws tasks and holds the simulation to the oracle, for as long as one likes.

python -m tests.generated --minutes 60
python -m tests.generated --seed 123
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import time
import traceback
from collections import Counter

from .compare import Fault, Report, check, extras
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
        if done and done % 100 == 0:
            print(f"{done} tasks, {len(failed)} failed", flush=True)
        drawn = draw(seed)
        try:
            report = check(drawn, **extras(seed))
        except Exception as error:
            trace = traceback.format_exc(limit=-4)
            report = Report([Fault("harness", f"{type(error).__name__}: {error}\n{trace}")])
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


NAMED = ("derived", "fingerprint", "fingerprint_covers", "save", "config")
"""Fields of a task that are counted where it has them."""


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
    names += ["chosen by rounding"] if report.has_tie else []
    names += [f"useless: {report.useless[:60]}"] if report.useless else []
    names += [f"{name}" for name in NAMED if getattr(drawn.task, name)]
    names += [f"metric {name}" for name in drawn.task.metrics]
    names += [f"data {kind}" for kind in {each.split()[-1] for each in features["arrays"]}]
    for key in ("layers", "encoders"):
        names += [f"{key} {name}" for name in sorted(set(features[key]))]
    return names


if __name__ == "__main__":
    main()
