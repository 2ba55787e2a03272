"""A load generator for any OpenAI-compatible endpoint. It imports nothing else of Hocket."""
