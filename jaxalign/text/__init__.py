"""Plain text work: wire strings, cutting extra turns, similarity. No jax."""
