"""Lists the hostile acts, and counts them by kind: ``python -m tests.hostile [--count]``."""

import argparse

from .acts import KINDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true", help="Numbers only.")
    options = parser.parse_args()
    for kind, acts in KINDS.items():
        print(f"{kind}: {len(acts)}")
        for name in () if options.count else acts:
            print(f"    {name}")
    print(f"in all: {sum(map(len, KINDS.values()))}")


if __name__ == "__main__":
    main()
