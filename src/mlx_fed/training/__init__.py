"""Local training and evaluation of a task on one client's examples."""
