"""Drives the pure schedulers in virtual time: a heap, a loop, and a cost table for a device."""
