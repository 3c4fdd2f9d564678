"""What benchmarks/frontier.py needs: the runs, two tasks, and the table and figure of results."""
