"""How a finished run is measured."""
