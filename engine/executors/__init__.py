"""Ways of running a step plan: each is a schedule over the same dense slices."""
