"""A federation of machines: one server process, and resident nodes."""
