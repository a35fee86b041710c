"""Training from spec files: adapters and probes, to folders that a stopped training goes on from."""
