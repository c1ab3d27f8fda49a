"""Arithmetic on tensor maps, and on the numbers of a step."""
