"""Two endpoints or two settings against each other: runs in pairs, a ratio, an interval."""
