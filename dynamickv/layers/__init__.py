"""What each kind of layer holds of a KV cache."""
