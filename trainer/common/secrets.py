"""Recipes are written into run folders, adapters and trackers: an access token must not get in."""

from __future__ import annotations

import re

# By how their issuers begin them: Hugging Face, wandb, GitHub, GitLab, AWS, Google, Slack, OpenAI
# and its like; and private keys.
TOKEN = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_\w{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}"
    r"|\bxox[abpros]-[\w-]{10,}|\bsk-[\w-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def kind_of(text: str) -> str | None:
    """How a token in the text begins, without the rest of it; None if there is none."""
    found = TOKEN.search(text)
    return None if found is None else found[0][:5]
