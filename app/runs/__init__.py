"""The Runs & API tab."""
