"""Layers beside frozen ones: low rank, 4-bit storage, rows of embeddings."""
