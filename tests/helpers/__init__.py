"""What tests share: tasks, grids, servers and runs, a file for each subject."""
