"""One token after another: from a cache to an answer."""
