"""Files: read within bounds, written whole."""
