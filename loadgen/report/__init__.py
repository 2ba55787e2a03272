"""What a run looks like: on a terminal, in a file, on a page."""
