"""Adapters trained by ONNX Runtime, where PyTorch has no room.

`build` makes the artifacts on a workstation and is all here that knows of torch and onnx; the
rest runs on the device.
"""
