"""Who says which completion is better: judges, and the queue for people."""
