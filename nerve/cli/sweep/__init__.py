"""Many runs: the grid, where each trial runs, and the table at the end."""
