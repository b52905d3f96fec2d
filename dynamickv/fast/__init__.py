"""The decoder written out, and what precision "fast" computes it with."""
