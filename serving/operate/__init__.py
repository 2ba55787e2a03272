"""The commands for operators of a server that runs: clients of its admin port."""
