"""Writes adapters for other tools, checks what was written, and reads other tools' files."""
