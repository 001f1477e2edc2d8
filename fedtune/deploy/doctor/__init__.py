"""`fedtune doctor`: what would go wrong on this machine, found before a run is begun."""
