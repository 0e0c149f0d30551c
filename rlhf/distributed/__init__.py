"""Several processes: what crosses them, how they were launched, weights that an engine has sharded."""
