"""Layers and ops that relate the frames of a clip to each other."""
