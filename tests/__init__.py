import mlx_fed  # noqa: F401 - before any test imports mlx.core: on Linux it brings a fast BLAS
