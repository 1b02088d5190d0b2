"""Memory that the VAE of Stable Diffusion 1.x needs to encode pictures of 512x512, at once and in
slices as `Backbone.moments` takes them.

    python bench/long_work.py            # about three minutes on two idle cores, 4 GB of memory
    python bench/long_work.py --quick    # one and two pictures instead of one to four

The VAE has SD 1.5's config and random weights, and computes in fp32 on the CPU: what it needs does
not depend on its values. Each figure is the growth of a process's largest resident memory over what
it had before the first encoding, weights and pictures. Memory at once grows in proportion, so that
of 32 pictures is calculated from the line through the measured numbers.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import psutil
import torch
from _common import Bars, parser_of

SIDE, PICTURES, GB = 512, 32, 1e9
MANY = 8  # pictures in slices: more of them take longer and no more memory
SD15 = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": SIDE,
}
BOUND = 1.5  # GB that encoding may need, however many pictures there are


@torch.no_grad()
def growth(count: int, sliced: bool) -> float:
    """GB that encoding `count` pictures takes in this process, beside its inputs."""
    from diffusers import AutoencoderKL

    from trainer.backbones.vae import in_slices, posterior_moments

    torch.manual_seed(0)
    vae = AutoencoderKL(**SD15).eval()
    pixels = torch.rand(count, 3, SIDE, SIDE) * 2 - 1
    before = psutil.Process().memory_info().rss

    def encode(part: torch.Tensor) -> torch.Tensor:
        return posterior_moments(vae, part)

    if sliced:
        in_slices(vae, encode, pixels, pixels=SIDE * SIDE)
    else:
        encode(pixels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / GB


def measured(count: int, sliced: bool) -> float:
    """`growth` in a process of its own, whose memory nothing else has touched."""
    words = [sys.executable, __file__, "--child", json.dumps([count, sliced])]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--child", help="measure one case, and print it")
    options = parser.parse_args()
    if options.child:
        print(growth(*json.loads(options.child)))
        return
    bars = Bars("long_work", options.quick)
    counts = [1, 2] if options.quick else [1, 2, 4]
    at_once = [measured(count, sliced=False) for count in counts]
    for count, size in zip(counts, at_once, strict=True):
        bars.note(f"vae_encode_512_gb_{count}_at_once", round(size, 3))
    slope, start = np.polyfit(counts, at_once, 1)
    bars.note(
        f"vae_encode_512_gb_{PICTURES}_at_once_calculated", round(start + PICTURES * slope, 2)
    )
    many = 4 if options.quick else MANY
    bars.at_most(f"vae_encode_512_gb_{many}_in_slices", measured(many, sliced=True), BOUND)
    bars.write()


if __name__ == "__main__":
    main()
