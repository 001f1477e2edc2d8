"""One federated job, run by fedtune and by its peers; see `simulation_overhead.py`."""
