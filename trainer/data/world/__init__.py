"""The embedded world: scenes and clips of sprites, whose boxes, masks and words are known."""
