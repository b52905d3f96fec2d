"""The Lab tab: measurements."""
