"""Listeners of a run: the terminal, the dashboard and its page, reports and trackers."""
