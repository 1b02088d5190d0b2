"""The objective, the sampler and inversion."""
