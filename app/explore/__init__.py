"""The Explore tab: run, what-if, evidence."""
