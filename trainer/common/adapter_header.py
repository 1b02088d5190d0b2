"""Under which name an adapter's header holds its recipe."""

HEADER = "attention_trainer"
