"""What methods that edit pictures and clips have in common."""
