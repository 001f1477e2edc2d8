"""Edge artifacts, made of a base model, an adapter and a head on a workstation with PyTorch."""
