"""The fleet: which instance gets which request."""
