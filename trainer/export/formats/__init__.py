"""Formats of adapters, one file each, named as in `format=`."""
