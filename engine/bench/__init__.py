"""Measurements of the engine on the machine at hand: each returns a report, and asserts nothing."""

import os

# As `engine.build` does it, and before torch is imported: what is measured is what serves.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
