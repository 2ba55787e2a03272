"""One model instance: which requests compute which tokens in the next step."""
