"""Data: sources of captioned images and clips, the plan of which samples make a batch, and caches.
A source is one file here."""
