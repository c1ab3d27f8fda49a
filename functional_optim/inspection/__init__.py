"""Explain what a transform and an optimizer do."""
