"""Attention kernels: pure functions of query, key, value and mask."""
