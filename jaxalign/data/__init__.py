"""Rows in, arrays out: sources, formats, prompts, tokenizer, batches."""
