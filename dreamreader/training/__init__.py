"""Training from spec files: adapters and probes, in folders where a stopped training goes on."""
