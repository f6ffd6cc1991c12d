"""DPO on the policy's own completions."""
