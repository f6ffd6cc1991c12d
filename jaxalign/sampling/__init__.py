"""Drawing completions from a causal language model, and nothing else."""
