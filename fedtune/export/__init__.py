"""From an adapter to folders that other tools load."""
