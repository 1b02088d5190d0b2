"""Shards that are read as a stream, from a disk or a server."""
