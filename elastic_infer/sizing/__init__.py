"""Bytes and limits, known before anything is loaded."""
