"""What our server and nodes say to each other beside Flower's protocol, unknown to stock ones."""

WAIT = "mlx-fed-wait"
"""Seconds that a node lets the server hold its request: until there is work, or for life."""

RUN = "mlx-fed-run"
"""On a response after the run's end: its outcome."""

FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"
"""Outcomes of a run: every round is done; its operator ended it; it cannot go on. A server that
ends without one is waited for: its run is resumed."""

BYTES = "mlx-fed-bytes"
"""``START-END``: the bytes of an object that a node pulls, which has those before. Fewer are sent
where the object ends before; a SuperLink sends all of it."""

TOKEN = "mlx-fed-token"
"""``name:secret`` of the invitation with which a node registers."""
