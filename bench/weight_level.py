"""The weight level, measured on the embedded world by one command: what each method costs, learns
and forgets, beside full fine-tuning, and what can be said exactly.

    python bench/weight_level.py --keep ./kept
    python bench/weight_level.py --keep ./kept --only steps,fits
    python bench/weight_level.py --quick

The parts are `PARTS`. Runs stay under --keep: one that is finished is not made again unless
something in its recipe has changed; after a change of the code take another folder. With --only the
figures of the other parts stay as they are in the result file. Quick: the parts that need no
training to the end, on runs of two steps; writes nothing. Further words go to every `fit`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import diffusers
from _common import RESULTS, Bars, chosen_of, interval_of, parser_of, shares_of
from _runs import Run, Runs

from trainer.config.load import load_recipe
from trainer.evaluation.shares import Share
from trainer.export.probe import LIMIT

WORDS = {
    "full": ("recipe=custom_diffusion", "methods.selective=null", "methods.full={}"),
    "custom_diffusion": ("recipe=custom_diffusion",),
    **{
        name: (f"recipe={name}",)
        for name in ("lora", "dora", "qlora", "controls", "longlora", "peft_adapter")
    },
}
CONTINUAL = ("sequential_lora", "c_lora", "inflora", "coda_prompt")
SECOND = ("sprite:helicopter", "thing")  # the other concept of a merge, its first word
QUICK = ("run.steps=2", "data.prior_weight=0", "evaluate.steps=2")
QUICK_PARTS = ("steps", "storage", "peft", "exports", "geometry")


def steps_of_all() -> int:
    """The steps all methods are compared at: the default recipe's own."""
    return load_recipe(["recipe=custom_diffusion"]).run.steps


def fit_run(name: str) -> Run:
    return Run(name, (*WORDS[name], f"run.steps={steps_of_all()}"))


def rank_run(name: str, rank: int) -> Run:
    words = (f"recipe={name}", f"methods.{name}.rank={rank}", f"run.steps={steps_of_all()}")
    return Run(f"{name}_rank{rank}", words)


def continual_run(name: str) -> Run:
    return Run(name, (f"recipe={name}",), judged=False)


def second_run() -> Run:
    concept, init = SECOND
    words = ("recipe=custom_diffusion", f"data.concept={concept}", f"methods.new_token.init={init}")
    return Run("custom_diffusion_second", (*words, f"run.steps={steps_of_all()}"))


def joint_run() -> Run:
    """Both concepts at once; as in the paper each is seen as often as when it is alone."""
    first: Any = load_recipe(["recipe=custom_diffusion"])
    concepts, inits = zip(
        (first.data.concept, first.methods["new_token"].init), SECOND, strict=True
    )
    words = (
        "recipe=custom_diffusion",
        f"data.concept=[{','.join(concepts)}]",
        "data.token=[<v1>,<v2>]",
        "methods.new_token.tokens=[<v1>,<v2>]",
        f"methods.new_token.init=[{','.join(inits)}]",
        f"run.steps={2 * steps_of_all()}",
    )
    return Run("custom_diffusion_joint", words)


def steps(bars: Bars, runs: Runs) -> None:
    """Time of a training step, parameters trained, the optimiser's state; alone: without a new
    word."""
    from _steps import Step, facts, interleaved

    rounds = 5 if bars.quick else 31
    chosen = [fit_run(name) for name in WORDS] + [continual_run(name) for name in CONTINUAL]
    # a batch of the concept alone: class images would first have to be painted
    every = {run.name: runs.words_of(run, "data.prior_weight=0") for run in chosen}
    made = {name: Step(words) for name, words in every.items()}
    unet = sum(value.numel() for value in made["custom_diffusion"].backbone.unet.parameters())
    timed = interleaved(made, rounds, "full")
    found: dict[str, dict[str, Any]] = {}
    for name, step in made.items():
        own = facts(step)
        share = 100 * own["parameters"] / unet
        found[name] = {**own, "percent_of_unet": share, **timed[name]}
    bars.note("steps", found)
    del made
    alone = {
        name: Step(every[name], bare=True) for name in ("full", "custom_diffusion", "lora", "dora")
    }
    timed = interleaved(alone, rounds, "full")
    bars.note("steps_alone", timed)
    for name, figures in (("lora_step_faster", found), ("lora_step_faster_alone", timed)):
        bars.at_least(name, figures["lora"]["faster"], 1.35)
    for name, figures in (("dora_step_over_lora", found), ("dora_step_over_lora_alone", timed)):
        bars.at_most(name, figures["lora"]["faster"] / figures["dora"]["faster"], 1.15)


def storage(bars: Bars, runs: Runs) -> None:
    """QLoRA's bits, gradients and frozen base."""
    from _exactness import storage as measure

    found = measure(runs.words_of(fit_run("qlora"), "data.prior_weight=0"))
    for name in ("tiny", "sd15"):
        bars.at_most(f"qlora_{name}_bits", found[f"{name}_bits"], 4.13)
        bars.note(f"qlora_{name}_bits_with_tables", found[f"{name}_bits_with_tables"])
    bars.exactly("qlora_gradients_finite", found["gradients_finite"], 1)
    bars.exactly("qlora_base_unchanged", found["base_unchanged"], 1)
    bars.note("storage", found)


def peft(bars: Bars, runs: Runs) -> None:
    """LoRA beside peft's own model."""
    from _exactness import peft_difference

    for what, apart in peft_difference(runs.words_of(fit_run("lora"))).items():
        bars.at_most(f"lora_{what}_from_peft", apart, LIMIT)  # another order of adding up


def geometry(bars: Bars, runs: Runs) -> None:
    """Parameters of public U-Nets that Custom Diffusion trains."""
    from _exactness import counts

    found = counts()
    bars.exactly("sd15_unet", found["sd15_unet"], 859_520_964)
    bars.exactly("sdxl_unet", found["sdxl_unet"], 2_567_463_684)
    bars.exactly("sd15_cross_kv_millions", round(found["sd15_cross_kv"] / 1e6, 2), 19.17)
    bars.exactly("sdxl_cross_kv_millions", round(found["sdxl_cross_kv"] / 1e6, 1), 340.8)
    bars.note("geometry", found)


def exports(bars: Bars, runs: Runs) -> None:
    """Every form of every method's adapter, read back."""
    from _exactness import exported, exported_transformers

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        unets = {
            name: exported(runs.place(fit_run(name)) / "adapter.safetensors", out) for name in WORDS
        }
        transformers = exported_transformers(out)
    for name, found in (("unet", unets), ("transformers", transformers)):
        apart = [value for forms in found.values() for value in forms.values()]
        largest = max(value for value in apart if isinstance(value, float))
        bars.at_most(f"exports_{name}_largest_difference", largest, LIMIT)
        bars.note(f"exports_{name}", found)


def fits(bars: Bars, runs: Runs) -> None:
    """What each method learns and forgets at equal steps."""
    found = {name: judged(runs, fit_run(name)) for name in WORDS}
    full = found["full"]
    for name in ("lora", "dora", "qlora", "custom_diffusion"):
        bars.at_least(f"concept_{name}", found[name]["concept"], 0.75)
    for row in found.values():
        row["validation_over_full"] = row["validation_loss"] / full["validation_loss"]
    bars.note("fits", found)


def ranks(bars: Bars, runs: Runs) -> None:
    """DoRA beside LoRA at low ranks, Controls beside LoRA at the recipes' equal rank."""
    low = {f"{name} rank {rank}": judged(runs, rank_run(name, rank)) for name, rank in LOW_RANKS}
    bars.note("ranks", low | {name: judged(runs, fit_run(name)) for name in ("lora", "controls")})


LOW_RANKS = [(name, rank) for rank in (1, 2) for name in ("lora", "dora")]


def judged(runs: Runs, run: Run) -> dict[str, Any]:
    """A finished run in figures."""
    place, plan = runs.place(run), runs.read(run, "plan.json")
    table = runs.read(run, "evaluation.json")
    base, adapted = shares_of(table, "base"), shares_of(table, "adapted")
    return {
        "steps": runs.recipe(run).run.steps,
        "parameters": plan["trained"],
        "adapter_bytes": (place / "adapter.safetensors").stat().st_size,
        "concept": adapted["concept accuracy"],
        "concept_beside": adapted["concept beside another"],
        "other_beside": adapted["the other beside it"],
        "known_lost_points": 100 * (base["known sprites"] - adapted["known sprites"]),
        "validation_loss": adapted["validation loss"],
        "validation_loss_base": base["validation loss"],
        "image_similarity": adapted["CLIP-I"],
        "fidelity": adapted["fidelity"],
        "fidelity_of_known": adapted["fidelity of known sprites"],
        "second_concept": adapted["second judge: concept"],
        "second_beside": adapted["second judge: concept beside another"],
    }


def continual(bars: Bars, runs: Runs) -> None:
    """Five concepts one after another: what the earlier ones lose."""
    found = {}
    for name in CONTINUAL:
        facts = runs.read(continual_run(name), "continual.json")
        rows = facts["accuracy"]
        pictures = len(rows) * facts["images"]  # of all concepts
        found[name] = {
            "just_learned": Share(mean(row[-1] for row in rows), pictures),
            "mean_final": Share(facts["mean final accuracy"], pictures),
            "forgetting": facts["forgetting"],
            "accuracy": rows,
        }
    bars.note("continual", found)
    naive = found["sequential_lora"]["forgetting"]
    bars.at_least("forgetting_sequential_lora", naive, 0.05)  # else the next two say nothing
    for name in ("c_lora", "inflora"):
        bars.at_most(f"forgetting_{name}", found[name]["forgetting"], 0.5 * naive)


def merge(bars: Bars, runs: Runs) -> None:
    """Two concepts trained apart and merged, beside the two trained together."""
    one, other = runs.place(fit_run("custom_diffusion")), runs.place(second_run())
    out = runs.folder / "merged" / f"{one.name}+{other.name}" / "adapter.safetensors"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        runs.command("merge", f"adapter=[{one},{other}]", f"out={out}")
    runs.evaluate(out.parent)
    tables = {
        "merged": json.loads((out.parent / "evaluation.json").read_text(encoding="utf-8")),
        "joint": runs.read(joint_run(), "evaluation.json"),
    }
    bars.note("merge", {name: shares_of(table, "adapted") for name, table in tables.items()})
    merged, joint = (table["adapted"]["two concepts together"] for table in tables.values())
    bars.at_least("merged_over_joint", merged / joint if joint else 0.0, 0.7)


@dataclass(frozen=True)
class Part:
    report: Callable[[Bars, Runs], None]
    needs: Callable[[], list[Run]] = list


PARTS = {
    "geometry": Part(geometry),
    "peft": Part(peft),
    "storage": Part(storage),
    "steps": Part(steps),
    "fits": Part(fits, lambda: [fit_run(name) for name in WORDS]),
    "exports": Part(exports, lambda: [fit_run(name) for name in WORDS]),
    "ranks": Part(
        ranks,
        lambda: [rank_run(*each) for each in LOW_RANKS] + [fit_run("lora"), fit_run("controls")],
    ),
    "merge": Part(merge, lambda: [fit_run("custom_diffusion"), second_run(), joint_run()]),
    "continual": Part(continual, lambda: [continual_run(name) for name in CONTINUAL]),
}


def table(figures: dict[str, Any]) -> str:
    """The README's table, of the figures there are."""
    costs, learned = figures.get("steps", {}), figures.get("fits", {})
    lines = [
        "| method | trains, % of the U-Net | adapter | optimiser state | step, times faster "
        "| concept | by the second judge | fidelity | known sprites lost | validation loss |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in WORDS:
        cost, fit = costs.get(name, {}), learned.get(name, {})
        cells = [
            "full fine-tuning" if name == "full" else f"`{name}`",
            _cell(cost, "parameters", "{:,}") + _cell(cost, "percent_of_unet", ", {:.1f} %", ""),
            _cell(fit, "adapter_bytes", "{:,.0f} kB", scale=1e-3),
            _cell(cost, "optimiser_bytes", "{:,.0f} kB", scale=1e-3),
            _cell(cost, "faster", "{:.2f}"),
            _cell(fit, "concept", "{:.0f} %", scale=100),
            _cell(fit, "second_concept", "{:.0f} %", scale=100),
            _cell(fit, "fidelity", "{:.2f}") + _cell(fit, "fidelity_of_known", " of {:.2f}", ""),
            _cell(fit, "known_lost_points", "{:.1f} points"),
            _cell(fit, "validation_loss", "{:.4f}"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    later = figures.get("continual", {})
    if later:
        lines += ["", "| five concepts in a row | just learned | at the end | forgotten |"]
        lines += ["|---|---|---|---|"]
        for name, row in later.items():
            keys = ("just_learned", "mean_final", "forgetting")
            cells = [_cell(row, key, "{:.0f} %", scale=100) for key in keys]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    low = figures.get("ranks", {})
    if low:
        lines += [
            "",
            "| at equal rank | trains | concept | beside another | known sprites lost "
            "| validation loss |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in low.items():
            cells = [
                f"`{name}`",
                _cell(row, "parameters", "{:,}"),
                _cell(row, "concept", "{:.0f} %", scale=100),
                _cell(row, "concept_beside", "{:.0f} %", scale=100),
                _cell(row, "known_lost_points", "{:.1f} points"),
                _cell(row, "validation_loss", "{:.4f}"),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], key: str, form: str, none: str = "-", scale: float = 1) -> str:
    """With the 95 % interval of a share. scale: leave counts as they are, so that they print as
    whole numbers."""
    if key not in row:
        return none
    text = form.format(row[key] if scale == 1 else scale * row[key])
    ends = interval_of(row[key]) or row.get(f"{key} 95 %")  # of this run, or of an earlier one
    return f"{text} ({scale * ends[0]:.0f} to {scale * ends[1]:.0f})" if ends else text


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    parser = parser_of(__doc__, list(PARTS), keeps=True, words=True)
    options = parser.parse_args()
    quick_parts = options.quick and not options.only
    parts = QUICK_PARTS if quick_parts else chosen_of(options.only, list(PARTS), parser)
    bars = Bars("weight_level", options.quick, update=bool(options.only))
    words = (*(QUICK if options.quick else ()), *options.words)
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(options.keep or Path(scratch), words, 4 if options.quick else 32)
        # first what needs the machine to itself
        for part in parts:
            if not PARTS[part].needs():
                PARTS[part].report(bars, runs)
                bars.write()
        runs.make(run for part in parts for run in PARTS[part].needs())
        for part in parts:
            if PARTS[part].needs():
                PARTS[part].report(bars, runs)
                bars.write()
    text = table(bars.found)
    print(text)
    if not options.quick:
        (RESULTS / "weight_level.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
