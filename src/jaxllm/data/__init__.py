"""Text to packed batches: corpus, tokenizer, token arrays, rows, loader."""
