"""Training and fine-tuning the attention of diffusion models."""
