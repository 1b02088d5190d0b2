"""Layers and ops that look across the frames of a clip."""
