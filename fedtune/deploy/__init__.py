"""A federation on several machines: its keys, its server, its sites."""
