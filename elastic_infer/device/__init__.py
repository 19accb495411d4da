"""Places of tensors: devices, streams, tables shared with the host, large pages."""
