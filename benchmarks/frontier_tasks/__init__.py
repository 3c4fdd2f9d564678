"""What benchmarks/frontier.py runs: the table of runs, the two tasks, table and figure."""
