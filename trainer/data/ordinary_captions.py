"""Ordinary captions of photographs, for what is to stay as it is while a model that knows
photographs is changed; each is made up of a subject, a place and a circumstance."""

from __future__ import annotations

SUBJECTS: tuple[str, ...] = (
    "an old man with a grey beard", "two children with balloons", "a woman in a raincoat",
    "a young couple", "a fisherman", "a group of tourists", "a girl who plays the violin",
    "a chef with a knife", "a nurse", "a football player", "a bride with flowers",
    "a man who rides a horse", "a sleeping baby", "a street musician",
    "three friends with bicycles",
    "a brown dog", "a black cat", "a herd of sheep", "a parrot", "a swan with its young",
    "an elephant", "a small lizard", "two horses", "a school of fish", "a butterfly",
    "a yellow taxi", "an old steam train", "a red tractor", "a sailing boat", "a fire engine",
    "a motorcycle", "a wooden chair", "a piano", "a stack of books", "a laptop and a cup of coffee",
    "a glass vase", "a pair of worn boots", "a grandfather clock", "a loaf of bread",
    "a bowl of noodles", "a basket of apples", "a birthday cake", "a plate of cheese",
    "a stone bridge", "a church tower", "a small cottage", "a glass skyscraper", "a windmill",
    "an oak tree", "a field of tulips",
)  # fmt: skip
PLACES: tuple[str, ...] = (
    "in a crowded market", "by a frozen lake", "on a sandy beach", "in front of a brick wall",
    "at the edge of a forest", "in a narrow street", "on a mountain pass", "in a quiet garden",
    "beside a river", "in an empty car park", "on a wooden table", "under a bridge",
    "in the desert", "at a harbour", "in a kitchen", "near a waterfall", "on a rooftop",
    "in a railway station", "between tall buildings", "on a farm", "in a museum", "by a window",
    "in tall grass", "on a cobbled square", "behind a fence", "in a library", "on an island",
    "next to a swimming pool", "in a workshop", "along a country road", "in a theatre",
    "at a playground", "in a snowy valley", "on a stage", "in a greenhouse", "at a petrol station",
    "on a pier", "in a village", "in a living room", "under a blue sky",
)  # fmt: skip
CIRCUMSTANCES: tuple[str, ...] = (
    "in the morning", "at sunset", "on a rainy day", "in thick fog", "at night under street lamps",
    "seen from above", "in black and white", "in bright sunshine", "with a blurred background",
    "from far away", "in autumn", "during a festival", "in soft light", "as a close-up",
    "before a storm", "reflected in water", "at noon", "in winter", "with long shadows",
    "in spring", "seen from behind", "by candlelight", "through a dirty pane", "on a cloudy day",
    "in the evening",
)  # fmt: skip


def ordinary_captions(count: int) -> list[str]:
    """`count` captions, the same ones every time; no two are equal among the first 1,000."""
    return [
        f"{SUBJECTS[n % len(SUBJECTS)]} {PLACES[(3 * n + n // 50) % len(PLACES)]} "
        f"{CIRCUMSTANCES[(7 * n + n // 50) % len(CIRCUMSTANCES)]}"
        for n in range(count)
    ]
