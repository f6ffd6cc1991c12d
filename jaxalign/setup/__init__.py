"""The wiring: a config in, a finished run folder out."""
