"""Requests made from the server's own OpenAPI document by schemathesis."""
