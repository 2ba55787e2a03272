"""The shell around the pure core: command line, HTTP, text, processes, and the cluster's driver."""
