"""Generated from `proto/fedtune/v1`; see `scripts/generate_wire.py`."""
