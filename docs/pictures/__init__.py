"""The pictures of the documentation, drawn from data by `python -m docs.pictures.draw`."""
