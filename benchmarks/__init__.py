"""Where README's numbers come from. `python -m benchmarks` prints a table and writes JSON."""
