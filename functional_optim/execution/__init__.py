"""Run transforms in place."""
