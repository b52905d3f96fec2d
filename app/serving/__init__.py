"""One machine, many people: models, turns, limits, logs."""
