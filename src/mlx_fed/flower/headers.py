"""HTTP headers of the Fleet API's requests: Flower's media type, and our optional additions.

A stock SuperNode or SuperLink ignores the additions.
"""

PROTOBUF = "application/protobuf"
"""The media type of bodies."""

WAIT = "mlx-fed-wait"
"""Seconds of a long poll: the server delays the response until there is a message or news."""

RUN = "mlx-fed-run"
"""On a response after the run's end: its outcome."""

FINISHED, STOPPED, FAILED = OUTCOMES = ("finished", "stopped", "failed")
"""Outcomes of a run: every round is done; its operator ended it; it cannot continue. Nodes wait
for a server that ends without an outcome: its run is resumed."""

BYTES = "mlx-fed-bytes"
"""``START-END``: the bytes of an object that a node pulls, which has the bytes before. The
response is shorter where the object ends before; a SuperLink sends all of it."""

TOKEN = "mlx-fed-token"
"""``name:secret`` of the invitation with which a node registers."""
