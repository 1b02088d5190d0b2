"""Ops by which attention sees fewer tokens, or less of them."""
