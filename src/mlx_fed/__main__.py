"""``python -m mlx_fed``: the ``mlx-fed`` command."""

from .cli.main import main

main()
