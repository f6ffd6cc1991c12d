"""PPO, and RLOO and GRPO, which share its loss."""
