"""Pure array functions: losses, filters, log-probabilities, optimizers."""
