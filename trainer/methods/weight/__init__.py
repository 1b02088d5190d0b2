"""Methods that change weights."""
