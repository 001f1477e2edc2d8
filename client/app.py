"""Flower's entry point of a client; all logic is in `fedtune`."""

from fedtune.simulation.flower_run import client_app

app = client_app()
