"""Where an instance runs: handles, the hosts of its program, and what they say to each other."""
