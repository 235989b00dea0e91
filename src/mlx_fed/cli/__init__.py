"""The ``mlx-fed`` command."""
