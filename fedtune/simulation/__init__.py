"""A federation on one machine: the same rounds, strategy and apps, without a network."""
