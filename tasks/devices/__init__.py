"""Devices: their rows and leases, and what gateways and workers remember of them."""
