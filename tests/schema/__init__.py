"""Requests made from the server's own OpenAPI document, by schemathesis, in an environment of its own."""
