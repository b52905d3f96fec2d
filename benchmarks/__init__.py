"""Where README's numbers come from. `python -m benchmarks` prints a table and writes JSON."""

import app.threads  # noqa: F401  (before torch: threads wait as the page's do)
