"""Federated rounds: the loop, its phases and checks, strategies, settings and resuming."""
