"""Differential privacy: the noise's randomness, and the account of what was released."""
