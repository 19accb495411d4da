"""Checkpoints on disk: config.json, width tables, safetensors, the Hub, stored codes."""
