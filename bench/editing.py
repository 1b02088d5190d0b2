"""What edits by attention do on the small world, where masks and words are known.

    python bench/editing.py
    python bench/editing.py --only p2p,masactrl
    python bench/editing.py --quick

The parts are `PARTS`. With --only the other figures stay as they are in the result file. Quick: two
scenes of each part in few steps, which says nothing of any method. Real scenes are inverted without
null-text embeddings; plain stands for the prompt alone, from the same noise.
"""

from __future__ import annotations

from collections.abc import Callable

import _edit_makes as makes
import _edit_parts as parts
from _common import Bars, chosen_of, parser_of
from _edit_scenes import Studio

SCENES = 64
PARTS: dict[str, Callable[[Bars, Studio], None]] = {
    "inversion": makes.inversion,
    "p2p": parts.p2p,
    "masactrl": parts.masactrl,
    "pnp": parts.pnp,
    "masks": makes.masks,
    "diffumask": makes.diffumask,
    "shape_guided": parts.shape_guided,
    "tf_icon": parts.tf_icon,
    "fam_diffusion": makes.fam,
    "aid": makes.aid,
    "cost": makes.cost,
}


def main() -> None:
    parser = parser_of(__doc__, list(PARTS))
    parser.add_argument("--scenes", type=int, default=SCENES, help="of each part")
    options = parser.parse_args()
    chosen = chosen_of(options.only, list(PARTS), parser)
    bars = Bars("editing", options.quick or options.scenes != SCENES, bool(options.only))
    bars.note_when()
    studio = Studio(2, steps=4) if options.quick else Studio(options.scenes)
    for name in chosen:
        PARTS[name](bars, studio)
        bars.write()


if __name__ == "__main__":
    main()
