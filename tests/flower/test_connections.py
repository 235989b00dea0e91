"""How many connections a server takes: as many as it may have files open, and no more."""

from __future__ import annotations

import pytest

from ..conftest import python


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "most"),
    [(256, 1000, 492, 300), (256, 400, 400, 208), (100, 100, 100, 1)],
)
def test_a_server_makes_room_for_its_connections(soft, hard, raised, most):
    done = python(
        f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from mlx_fed.flower import connections
connections.MAX_CONNECTIONS = 300
most = connections.raise_file_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], most)
"""
    )
    assert done.stdout.split() == [str(raised), str(most)]
