"""Text and token ids: tokenizer, chat template, incremental detokenizer."""
