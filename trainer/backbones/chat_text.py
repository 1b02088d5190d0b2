"""Text of language models: a prompt is asked in a chat, see `family.ChatTemplate`, and the features
of its tokens are as many as the prompt needs.

    hidden (b, n, d), mask (b, n) -> tokens (b, m, d), mask (b, m), padding last and 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.backbones.family import ChatTemplate

if TYPE_CHECKING:
    from torch import Tensor


def without_padding(hidden: Tensor, mask: Tensor, *, dropped: int = 0) -> dict[str, Tensor]:
    """Features (b, n, d) of tokens of which mask (b, n) is 0 at padding, wherever that is, to
    `tokens` (b, m, d) and `mask` (b, m) with padding at the end, m as long as the longest prompt.
    dropped: tokens at the start of each prompt that are left out."""
    from torch.nn.utils.rnn import pad_sequence

    rows = [row[own.bool()][dropped:] for row, own in zip(hidden, mask, strict=True)]
    ones = [mask.new_ones(len(row)) for row in rows]
    return {
        "tokens": pad_sequence(rows, batch_first=True),
        "mask": pad_sequence(ones, batch_first=True),
    }


def check_template(
    tokenizer: Any, template: ChatTemplate, name: str, *, enable_thinking: bool
) -> None:
    """Checks that a tokenizer asks a prompt as the family says it does. enable_thinking: the option
    that the stock pipeline gives Qwen's chat templates.

    Raises:
        ValueError: it has no chat template, or another one.
    """
    from jinja2 import TemplateError

    try:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )
    except (ValueError, TemplateError):  # of transformers where there is none
        asked = None
    if asked != template.around("a"):
        raise ValueError(
            f"backbone {name}: the chat template of its tokenizer gives {asked!r} for the prompt "
            f"'a', and this family was trained with {template.around('a')!r}; take the tokenizer "
            "of the published checkpoint"
        )
