"""The base of every error whose message is meant for the person at the terminal."""


class FedError(Exception):
    """Says what was wrong, where, and what to do; commands print it without a traceback."""
