"""The embedded world: scenes and clips composed of sprites, with known truth."""
