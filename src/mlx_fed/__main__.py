"""``python -m mlx_fed``: the ``mlx-fed`` command."""

from .cli import main

main()
