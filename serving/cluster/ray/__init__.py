"""Instances as Ray actors: the session, its control process, and the data plane beside it."""
