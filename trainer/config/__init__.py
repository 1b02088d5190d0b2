"""Recipes: what they may contain, and how YAML and `key=value` words become a checked one."""
