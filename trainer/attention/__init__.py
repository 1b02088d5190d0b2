"""The seam between methods and backbones: an attention layer is a site, an edit is an op in it."""
