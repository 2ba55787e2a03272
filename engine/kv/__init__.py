"""KV memory as tensors."""
