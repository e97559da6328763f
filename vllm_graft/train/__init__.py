"""Training the module that serves: live engines, exact log-probabilities, optimizers."""
