"""Transforms, their states and their hyperparameters."""
