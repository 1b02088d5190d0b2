"""The page of a run, and the page that compares runs: HTML files that need nothing beside them."""
