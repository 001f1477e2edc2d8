"""Secure aggregation, sans-IO: states and messages; no network, clock, files or torch."""
