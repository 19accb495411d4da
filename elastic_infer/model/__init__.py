"""One pass of the model: weights as tiles, tables of a batch, layers."""
