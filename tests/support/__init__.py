"""Helpers of the tests: small models, engines, the emulated device, files that fail."""
