"""What to buy and how to start it: the cheapest mix of GPU types for a latency objective."""
