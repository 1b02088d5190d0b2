"""Recipes: what they may say, and how YAML and `key=value` words become a checked one."""
