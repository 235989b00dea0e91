"""The folder of a run: its history, status and labels."""
