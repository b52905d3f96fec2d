"""On from a run: the smallest capacity that still answers, another question, earlier runs."""
