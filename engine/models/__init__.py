"""Model families as dense slices, and how their weights are read."""
