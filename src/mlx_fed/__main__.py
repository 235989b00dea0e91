"""``mlx-fed`` and ``python -m mlx_fed``."""

import signal


def main() -> None:
    """The ``mlx-fed`` command. Ctrl-C during its imports ends it without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from .cli.main import app

    app(prog_name="mlx-fed")


if __name__ == "__main__":
    main()
