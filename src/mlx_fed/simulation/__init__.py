"""A whole federation on this machine: clients trained many at once, by several processes."""
