"""Datasets and their partitions among clients."""

from .partitions import (
    DataError,
    columns,
    load_partition,
    load_test_split,
    partition_settings,
)

__all__ = ["DataError", "columns", "load_partition", "load_test_split", "partition_settings"]
