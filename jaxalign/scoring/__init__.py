"""Reward models: texts in, scores out, few compilations."""
