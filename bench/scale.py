"""From a laptop to a cluster: what larger data and more processes cost, against the bars.

    python bench/scale.py
    python bench/scale.py --only stream_order,plan
    python bench/scale.py --quick

The parts are `PARTS`. `slurm` needs root and Debian's packages slurm-wlm and munge, and is left out
without them. With --only the other figures stay as they are in the result file.
"""

from __future__ import annotations

from collections.abc import Callable

import _scale_data
import _scale_watching
from _common import Bars, chosen_of, parser_of
from _scale_ranks import losses, sharded_bytes
from _scale_slurm import slurm

PARTS: dict[str, Callable[[Bars], None]] = {
    **_scale_data.PARTS,
    "losses": losses,
    "sharded_bytes": sharded_bytes,
    "slurm": slurm,
    **_scale_watching.PARTS,
}


def main() -> None:
    parser = parser_of(__doc__, list(PARTS))
    options = parser.parse_args()
    parts = chosen_of(options.only, list(PARTS), parser)
    bars = Bars("scale", options.quick, update=bool(options.only))
    for part in parts:
        PARTS[part](bars)
        bars.write()


if __name__ == "__main__":
    main()
