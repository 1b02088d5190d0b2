"""A training run, from recipe to adapter."""
