"""Model architectures: Flax modules inside traces, plain dicts outside."""
