"""Where keys and values live: block groups, one pool per tier, and who owns which block."""
