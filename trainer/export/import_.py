"""Makes an adapter of another tool's file, so that a run can start from it."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from trainer.backbones.device import CPU, Placement
from trainer.common.atomic import written_atomically
from trainer.common.program import program
from trainer.config.lineage import backbone_spec
from trainer.export.apply_bundle import add_to
from trainer.export.bundle import Bundle, DoRADelta, FullDelta, LowRankDelta
from trainer.export.bundle_methods import recipe_of, tensors_of, trainable
from trainer.export.detect import detect
from trainer.export.find_format import find_format
from trainer.export.import_check import Question, compare
from trainer.export.probe import LIMIT, Probe, Say, difference
from trainer.export.read_tokens import read_tokens
from trainer.export.start_recipe import write_recipe
from trainer.runs.adapter import load_adapted, load_base, save_adapter


def import_file(
    path: Path,
    backbone: str,
    out: Path,
    *,
    format_name: str = "auto",
    say: Say = print,
    placement: Placement = CPU,
) -> Path:
    """Writes the file of another tool as an adapter to `out`, and beside it a recipe that starts
    from it.

    What was read is compared with what the tool's own loader makes of the file, wherever one is
    installed, weight by weight; the adapter is compared with what was read, by its output.

    path: a file, or the folder of an export; backbone: the name or folder of the backbone it is
    for; format_name: `auto` recognises the format; say: receives each line for the user; placement:
    where the adapter is proven. Returns `out`.

    Raises:
        ValueError: `out` or the recipe exists; the file is not safetensors, is damaged, is of no
            known format or for another backbone; it changes layers that no method adapts; or
            another loader reads it differently.
    """
    recipe = out.with_name(out.name.removesuffix(".safetensors") + ".yaml")
    _check_paths(path, out, recipe)
    spec = backbone_spec(backbone)
    found = detect(path) if format_name == "auto" else format_name
    base = load_base(spec, backbone)
    bundle = read_bundle(found, path, base)
    methods = recipe_of(bundle, base)
    for note in bundle.notes:
        say(note)
    probe = Probe(base, [*bundle.tokens, *bundle.known], placement=placement)
    wanted = probe(add_to(base, bundle))
    say(compare(Question(found, path, bundle), base, lambda: load_base(spec, backbone)))
    del base  # changed, and its memory is needed
    tensors, identity = tensors_of(bundle, methods, load_base(spec, backbone))
    tree = {"backbone": backbone, "methods": methods}
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(out) as part:
        save_adapter(part, tensors, tree=tree, identity=identity)
        largest = difference(probe(load_adapted(part)[0]), wanted)
        _refuse_difference(path, largest)
    try:
        write_recipe(recipe, out, tree)
    except BaseException:  # so that the same command can be given again
        out.unlink()
        raise
    for line in _told(found, bundle, largest, recipe=recipe):
        say(line)
    return out


def _told(found: str, bundle: Bundle, largest: float, *, recipe: Path) -> tuple[str, str]:
    """What was imported, in lines for the user."""
    return (
        f"{found}: {_counted(bundle)}; the adapter's output differs from that of what was read by "
        f"at most {largest:.1e} (allowed {LIMIT:.0e})",
        f"to start from it: {program()} fit {shlex.quote(f'recipe={recipe}')} "
        "data.concept=<folder of images> data.class_word=<what they show, as in dog>",
    )


def _check_paths(path: Path, out: Path, recipe: Path) -> None:
    if out == recipe:
        raise ValueError(f"out={out}: the recipe is written there; give a .safetensors file")
    for target in (out, recipe):
        if target.exists():
            raise ValueError(
                f"out={target} exists; give a file that does not, nothing is overwritten"
            )
    if not path.exists():
        raise ValueError(f"file={path}: no such file or folder")


def _refuse_difference(path: Path, largest: float) -> None:
    if largest > LIMIT:
        raise ValueError(
            f"file={path}: the output of the adapter differs by {largest:.1e} from what the file "
            f"gives, and {LIMIT:.0e} is allowed; nothing was written"
        )


def read_bundle(format_name: str, path: Path, base: Any) -> Bundle:
    """What a file adds to the base, as methods can hold it.

    Raises:
        ValueError: as `import_file`; the message names the file.
    """
    if format_name == "embedding":
        return read_tokens([path], base)
    reader = find_format(format_name).read
    if reader is None:
        raise ValueError(
            f"format={format_name} is a complete pipeline; train on it with backbone={path}"
        )
    try:
        return trainable(reader(path, base), base)
    except ValueError as error:
        named = str(path) in str(error)
        raise (error if named else ValueError(f"file={path}: {error}")) from None


def _counted(bundle: Bundle) -> str:
    """What a bundle holds, in words."""
    kinds = {LowRankDelta: "LoRA", DoRADelta: "DoRA", FullDelta: "full"}
    names = {"loha": "LoHa", "lokr": "LoKr"}
    counts = Counter(
        names[bundle.forms[path].type] if path in bundle.forms else kinds[type(delta)]
        for path, delta in bundle.layers.items()
    )
    words = [f"{count} {kind} layers" for kind, count in counts.items()]
    words += [f"the words {', '.join(bundle.tokens)}"] if bundle.tokens else []
    words += [f"the known words {', '.join(bundle.known)}"] if bundle.known else []
    return ", ".join(words)
