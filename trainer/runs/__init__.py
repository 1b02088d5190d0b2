"""Finished runs: their folder, their adapter, and merging several."""
