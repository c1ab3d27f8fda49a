"""Compile the update of a unit into one loop."""
