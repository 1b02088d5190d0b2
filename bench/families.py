"""Which denoisers are hosted and which families are proven, and what a host and a plan cost.

    python bench/families.py                  # all parts, about half an hour
    python bench/families.py --quick          # not families, and of trained two: ten minutes
    python bench/families.py --only families
    python bench/families.py --only trained flux1 sd3

classes: of all denoiser classes of diffusers, how many a host leaves equal to the bit, how many it
refuses by name, and how many it does neither with. families: of those in `PROVEN`, how many sample
what the stock pipeline does from the same noise, within 2/255, and how many are trained and
exported so that the stock pipeline with the adapter makes the same pictures; both are the families'
own tests, all of whose cases are tried. host_cost: processor time of a step of a small FLUX with a
host and no op, over one without a host, taken in turns. plan: seconds and memory of a plan of
FLUX.1 dev, of which no weight is here. trained: every family's tiny folder, of random weights, is
trained for 300 steps on scenes of the world, by LoRA and by the keys and values of the text alone:
the loss on held-out scenes, as a share of what it was; words name the families, all without any.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from _common import Bars, chosen_of, parser_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

PARTS = ("classes", "families", "host_cost", "plan", "trained")
QUICK = ("classes", "host_cost", "plan", "trained")
TRAINED_QUICK = ["sd3", "flux1"]
FALLS = 0.9  # a loss to this share of its start, at the most
# of each family: its file of tests, and words in the names of those that compare pictures with the
# stock pipeline, and of those whose export the stock pipeline reads
PICTURES, ADAPTER = "are_those_of_the_stock_pipeline", "a_stock_pipeline_paints_with_the_adapter"
CLIPS, FILMS = "clips_are_those_of_the_stock_pipeline", "a_stock_pipeline_films_with_the_adapter"
PROVEN: dict[str, tuple[str, str, str]] = {
    "sdxl": ("sdxl", f"pictures_{PICTURES}", ADAPTER),
    "sd3": ("sd3", f"pictures_{PICTURES}", ADAPTER),
    "flux1": ("flux1", f"pictures_{PICTURES}", ADAPTER),
    "chroma": ("chroma", f"pictures_{PICTURES}_that_masks", ADAPTER),
    "flux2": ("flux2", f"pictures_{PICTURES}", ADAPTER),
    "z_image": ("chat_families", f"pictures_{PICTURES} z_image", f"{ADAPTER} z_image"),
    "qwen_image": ("chat_families", f"pictures_{PICTURES} qwen_image", f"{ADAPTER} qwen_image"),
    "wan": ("video_families", f"{CLIPS} wan", f"{FILMS} wan"),
    "cogvideox": ("video_families", f"{CLIPS} cogvideox", f"{FILMS} cogvideox"),
    "ltx": ("video_families", f"{CLIPS} ltx", f"{FILMS} ltx"),
    "dit": ("dit", f"pictures_{PICTURES}", "exports_are_proven"),
    "pixart": ("pixart_published", f"pictures_{PICTURES}", "merged_stays_of_its_class"),
    "sana": ("sana", "a_public_folder_is_read_and_painted", "merged_is_a_pipeline_that_paints"),
}
TRAINED = list(PROVEN)  # families of the part trained
REPEATS, STEPS = 7, 10
# parameters of FLUX.1 dev, as published: its transformer, CLIP-L, the encoder of T5-XXL, the VAE
PUBLISHED = 11_901_408_320 + 123_060_480 + 4_762_310_656 + 83_819_683


def main() -> None:
    parser = parser_of(__doc__, PARTS)
    parser.add_argument("families", nargs="*", help="of the part trained")
    options = parser.parse_args()
    TRAINED[:] = chosen_of(",".join(options.families), list(PROVEN), parser)
    if options.quick and not options.families:
        TRAINED[:] = TRAINED_QUICK
    bars = Bars("families", options.quick, update=True)
    for part in chosen_of(options.only, PARTS, parser):
        if not options.quick or options.only or part in QUICK:
            globals()[part](bars)
    bars.note_when()
    bars.write()


def classes(bars: Bars) -> None:
    from attention.denoiser_corpus import CASES
    from attention.denoiser_page import found

    results = {name: found(name) for name in CASES}
    hosted = [name for name, each in results.items() if not each.refused]
    equal = [name for name in hosted if results[name].equal]
    # neither equal nor refused, or an op that changes nothing and says nothing
    silent = [
        name
        for name in hosted
        if not (results[name].equal or results[name].near)
        or not (results[name].changed or results[name].stopped)
    ]
    bars.note("denoiser_classes", len(results))
    bars.note("hosted", len(hosted))
    bars.at_least("hosted_bit_equal", len(equal), 60)
    bars.exactly("silent", len(silent), 0)


def families(bars: Bars) -> None:
    passed = _passed(sorted({file for file, _, _ in PROVEN.values()}))
    stock = [name for name, (file, test, _) in PROVEN.items() if _all(passed, file, test)]
    exported = [name for name, (file, _, test) in PROVEN.items() if _all(passed, file, test)]
    bars.at_least("families_that_sample_as_stock", len(stock), len(PROVEN))
    bars.at_least("families_trained_exported_read_back", len(exported), 12)
    bars.note("not_as_stock", sorted(set(PROVEN) - set(stock)))
    bars.note("not_read_back", sorted(set(PROVEN) - set(exported)))


def _passed(files: list[str]) -> dict[str, bool]:
    """Every test of these files by its name, and whether it passed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        paths = [f"tests/backbones/test_{file}.py" for file in files]
        line = [sys.executable, "-m", "pytest", "-q", *paths, f"--junitxml={report}"]
        subprocess.run(line, cwd=ROOT, env={**os.environ, "CASES": "all", "OMP_NUM_THREADS": "1"})
        found = ElementTree.parse(report).getroot().iter("testcase")
        return {
            f"{each.get('classname', '').rpartition('.')[2]}::{each.get('name')}": not list(each)
            for each in found
        }


def _all(passed: dict[str, bool], file: str, test: str) -> bool:
    found = [name for name in passed if name.startswith(f"test_{file}::")]
    own = [passed[name] for name in found if all(word in name for word in test.split())]
    return bool(own) and all(own)


def host_cost(bars: Bars) -> None:
    """Median of the ratios of pairs, each a few forward and backward passes in turns."""
    from attention.denoiser_corpus import CASES, make

    from trainer.attention.host import Host

    case = CASES["FluxTransformer2DModel"]
    native, hosted = make(case), make(case)
    Host.attach(hosted)
    ratios = []
    for _ in range(REPEATS + 1):
        one, other = _seconds(native, case), _seconds(hosted, case)
        ratios.append(other / one)
    found = sorted(ratios[1:])  # the first warms up
    bars.note("host_cost_quartiles", [round(each, 4) for each in statistics.quantiles(found, n=4)])
    bars.at_most("host_cost", statistics.median(found), 1.02)


def _seconds(model: Any, case: Any) -> float:
    inputs = case.inputs()
    began = time.process_time()
    for _ in range(STEPS):
        model(**inputs).sample.float().square().mean().backward()
        model.zero_grad()
    return time.process_time() - began


def trained(bars: Bars) -> None:
    from _trained_families import FORMS, share_left

    for family in TRAINED:
        for form in FORMS:
            began = time.process_time()
            share = share_left(family, form)
            if share is None:
                bars.note(f"trained_{family}_{form}", "reads no text")
                continue
            bars.at_most(f"trained_{family}_{form}", round(share, 3), FALLS)
            bars.note(f"trained_{family}_{form}_seconds", round(time.process_time() - began))


def plan(bars: Bars) -> None:
    words = ["recipe=lora", "backbone=flux1_dev", "data.concept=sprite:penguin"]
    words += ["data.prior_weight=0", "plan=true"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "trainer", "check", *words]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        began = time.monotonic()
        process = subprocess.Popen(line, cwd=folder, env=environment, stdout=said, stderr=said)
        _, _, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        said.seek(0)
        text = said.read()
    counted = re.search(r"trains ([\d,]+) of ([\d,]+) parameters", text)
    assert counted is not None, text
    trained, every = (int(number.replace(",", "")) for number in counted.groups())
    bars.at_most("plan_seconds", seconds, 10)
    bars.note("plan_processor_seconds", round(usage.ru_utime + usage.ru_stime, 1))
    bars.at_most("plan_gib", usage.ru_maxrss / 2**20, 2)
    bars.exactly("plan_parameters", every - trained, PUBLISHED)


if __name__ == "__main__":
    main()
