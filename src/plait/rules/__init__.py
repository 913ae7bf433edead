"""Rules: how parameters move (learning rates, gradients, ranks, layers)."""
