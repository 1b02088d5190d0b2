"""Webdataset shards: read, indexed in a manifest, verified, written."""
