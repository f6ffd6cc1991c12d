"""Hugging Face folders <-> parameters: a name table per model, no torch."""
