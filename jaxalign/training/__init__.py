"""What training methods share: the run, its loop, rollouts, the reference."""
