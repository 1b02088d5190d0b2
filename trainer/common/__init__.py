"""What every room may use; nothing here imports torch."""
