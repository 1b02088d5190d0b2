"""Methods that change the attention function."""
