"""Adapters written for other tools, proven, and read back."""
