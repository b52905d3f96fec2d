"""A prompt becomes a `Prefill`: encoding, observing, storing."""
