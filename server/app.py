"""Flower's entry point of the server; all logic is in `fedtune`."""

from fedtune.simulation.flower_run import server_app

app = server_app()
