"""Local training, behind one protocol."""
