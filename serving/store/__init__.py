"""Models on this machine: what is known, fetched, converted and kept."""
