"""Methods that change the features attention reads."""
