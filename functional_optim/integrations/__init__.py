"""Connections to frameworks, each imported only by who asks for it."""
