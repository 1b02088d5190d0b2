"""Methods that change attention maps."""
