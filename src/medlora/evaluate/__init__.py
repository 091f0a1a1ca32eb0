"""Is it better now? Held-out loss and perplexity, measured the same way on both sides of the training."""
