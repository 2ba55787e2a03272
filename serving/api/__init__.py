"""The OpenAI-compatible HTTP API: the only users of fastapi and pydantic."""
