"""Drives `scheduler.cluster` over instances: handles, streams, and the wire between them."""
