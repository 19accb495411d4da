"""Committed results as tables in the documentation."""
