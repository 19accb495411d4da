"""Where tensors lie: devices, streams, tables shared with the host, large pages."""
