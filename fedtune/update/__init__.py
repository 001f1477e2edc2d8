"""The ordered steps that an update goes through on its way to the wire, and back."""

from fedtune.update.steps import HalfPrecision, Step, UpdatePipeline, make_pipeline

__all__ = ["HalfPrecision", "Step", "UpdatePipeline", "make_pipeline"]
