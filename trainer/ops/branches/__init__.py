"""Trained branches of attention that read conditions other than the text: what several use."""
