"""What two sections of a recipe say of the same keys, those of guidance."""

TRUE_GUIDANCE = (
    "of backbones as FLUX.1-dev, whose guidance is an input of the network: strength of "
    "classifier-free guidance beside it, in twice the time; 1 or less for none"
)
TEMPORAL_GUIDANCE = (
    "of clips: strength with which frames are guided away from what they would be as pictures of "
    "their own, in half as much time again (arXiv 2302.03011, section 3.4); 1 for none"
)
