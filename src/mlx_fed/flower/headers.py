"""What our server and nodes say to each other beside Flower's protocol, unknown to stock ones."""

WAIT = "mlx-fed-wait"
"""Seconds that a node lets the server hold its request: until there is work, or for life."""

RUN = "mlx-fed-run"
"""``finished`` on a response after the run's end."""

TOKEN = "mlx-fed-token"
"""``name:secret`` of the invitation with which a node registers."""
