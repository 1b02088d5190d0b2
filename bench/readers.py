"""The files that `export` writes, read by the real tools: every weight is compared with our own.

    python bench/readers.py                           # stock diffusers and peft of this environment
    python bench/readers.py --comfyui ~/ComfyUI --sd-scripts ~/sd-scripts
    python bench/readers.py --forge ~/forge --python forge=~/forge/venv/bin/python

Each option names a checkout of a tool. Its own loader is called in a process of its own, with the
python that `--python` names for it and this one otherwise; it needs what that tool imports to read
an adapter. A model with Stable Diffusion 1.5's layers, but narrow and random, and a PixArt are
adapted by several methods; each export is read onto the plain weights, and the tool's result is
compared with the adapted model's weights, tensor by tensor; AnimateDiff-Evolved reads motion
modules too. Prints a table, with the commit of each checkout, and a BAR line for each tool; with
all tools given it writes them to docs/adapters.md and bench/results too. A tool that does not run
here has rows that say why. Nothing of the tools is copied.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from _common import Bars, parser_of, version_of  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from trainer.backbones import load_backbone  # noqa: E402
from trainer.config.lineage import backbone_spec  # noqa: E402
from trainer.config.load import methods_of  # noqa: E402
from trainer.export import motion  # noqa: E402
from trainer.export.export import export  # noqa: E402
from trainer.export.formats.merged import merge  # noqa: E402
from trainer.methods.apply import apply_methods  # noqa: E402
from trainer.ops.temporal.motion_names import theirs  # noqa: E402
from trainer.runs.adapter import load_adapted, save_adapter  # noqa: E402

PAGE = ROOT / "docs" / "adapters.md"
START, END = "<!-- readers: begin -->\n", "<!-- readers: end -->\n"
QUICK = 1  # methods of --quick
LIMIT = 1e-5  # of any weight; those of these models are about 0.1
TOOLS = ("comfyui", "sd-scripts", "forge", "invokeai", "animatediff-evolved")
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora": {"sites": "all", "rank": 4, "alpha": 6, "text_encoder": ["q", "v", "out"]}},
    "LoRA of several ranks, with convolutions": {
        "lora": {"sites": "all", "rank": 4, "layers": ["*conv1", "*ff.net.2"],
                 "ranks": {"*attn1.to_q": 2}}
    },
    "DoRA": {"dora": {"sites": "all", "rank": 4}},
    "Custom Diffusion": {"selective": {"sites": "cross"}},
    "all weights": {"full": {}},
}  # fmt: skip
MOTION = "motion modules"  # of a U-Net, and in one format
UNET = {
    "sample_size": 8, "in_channels": 8, "out_channels": 8, "cross_attention_dim": 128,
    "block_out_channels": (32, 64, 64, 64), "norm_num_groups": 8, "attention_head_dim": 4,
}  # fmt: skip
DIT = {
    "sample_size": 8, "in_channels": 8, "out_channels": 8, "num_layers": 2,
    "num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32,
    "caption_channels": 128,
}  # fmt: skip
# the formats that each tool is asked to read, on the U-Net and on the transformer
READS = {
    "diffusers": (("diffusers", "kohya", "merged"), ("merged",)),
    "peft": (("peft",), ("peft",)),
    "comfyui": (("comfyui", "diff", "kohya", "diffusers"), ("comfyui", "diff")),
    "sd-scripts": (("kohya",), ()),
    "forge": (("comfyui", "diff", "kohya", "diffusers"), ()),
    "invokeai": (("kohya",), ()),
    "animatediff-evolved": (("animatediff", "comfyui"), ()),
}


def main() -> None:
    options = _options()
    tools = {"diffusers": None, "peft": None}
    tools |= {name: getattr(options, name.replace("-", "_")) for name in TOOLS}
    pythons = dict(each.split("=", 1) for each in options.python)
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        made = list(_exports(work, quick=options.quick))
        rows = []
        for tool, checkout in tools.items():
            if checkout is None and tool in TOOLS:
                continue
            found = _read(tool, checkout, made, python=pythons.get(tool, sys.executable))
            rows += [(tool, version_of(tool, checkout), *row) for row in found]
    text, bars = _table(rows), Bars("readers", options.quick)
    print(f"\n{text}")
    _print_bars(rows, bars)
    bars.found["rows"] = rows
    if not options.quick and all(tools[name] for name in TOOLS):  # else rows of others were lost
        bars.write()
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
        after = rest.partition(END)[2]
        PAGE.write_text(before + START + text + END + after, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    for tool in TOOLS:
        parser.add_argument(f"--{tool}", type=Path, metavar="DIR", help=f"a checkout of {tool}")
    parser.add_argument(
        "--python", action="append", default=[], metavar="TOOL=PATH", help="what runs a tool"
    )
    return parser.parse_args()


def _exports(work: Path, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Every export that a tool is to read: its folder, the plain backbone's, the weights."""
    for kind, number in (("unet", 0), ("transformer", 1)):
        base = _backbone(work / kind, kind)
        formats = {name for asked in READS.values() for name in asked[number]}
        methods = dict(list(METHODS.items())[: QUICK if quick else None])
        if kind == "unet":
            methods[MOTION] = {"animatediff": {}}
        for what, tree in methods.items():
            own = dict(tree) if kind == "unet" else _of_transformer(tree)
            path = _adapter(work / f"{kind}-{what}.safetensors", base, own)
            wanted = _wanted(path, kind, what)
            for name in sorted(formats):
                if (name == "animatediff") != (what == MOTION):
                    continue
                out = work / f"{kind}-{what}-{name}" / "adapter"
                out.parent.mkdir()
                try:
                    export(path, out, name, say=lambda line: None)
                except ValueError as error:
                    print(f"{kind}, {what}: {str(error)[:160]}", file=sys.stderr)
                    continue
                yield {
                    "kind": kind, "what": what, "format": name, "folder": str(out),
                    "base": str(base), "wanted": str(wanted),
                }  # fmt: skip


def _wanted(path: Path, kind: str, what: str) -> Path:
    """A file of the weights that an adapter makes, by the names that readers give them."""
    adapted = load_adapted(path)[0]
    if what == MOTION:
        own = motion.tensors(adapted)
        found = {f"motion.{other}": own[name].clone() for name in own for other in theirs(name)}
    else:
        adapted = merge(adapted)
        parts = {kind: adapted.denoiser, "text_encoder": adapted.text_encoder}
        found = {
            f"{part}.{name}": value.contiguous()
            for part, module in parts.items()
            for name, value in module.state_dict().items()
        }
    place = path.with_name(f"{path.stem}-wanted.safetensors")
    save_file(found, place)
    return place


def _of_transformer(tree: dict[str, Any]) -> dict[str, Any]:
    """The methods without what a transformer of this kind has not: convolutions, a LoRA of CLIP."""
    found = {name: dict(options) for name, options in tree.items()}
    if "lora" in found:
        found["lora"].pop("text_encoder", None)
        found["lora"] |= {"layers": ["*ff.net.2"]}
    return found


def _backbone(folder: Path, kind: str) -> Path:
    """A random backbone in diffusers layout, with the text encoder and VAE that ship."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    torch.manual_seed(0)
    shipped = load_backbone(backbone_spec("tiny" if kind == "unet" else "tiny_dit"), "tiny")
    net = UNet2DConditionModel(**UNET) if kind == "unet" else PixArtTransformer2DModel(**DIT)
    setattr(shipped, kind, net)
    shipped.pipeline().save_pretrained(folder)
    return folder


@torch.no_grad()
def _adapter(path: Path, base: Path, methods: dict[str, Any]) -> Path:
    """An adapter whose trained tensors are moved by a tenth of their spread."""
    model = load_backbone(backbone_spec(str(base)), str(base))
    plan = apply_methods(model, methods_of(methods))
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    generator = torch.Generator().manual_seed(1)
    for name in plan.names:
        spread = max(float(own[name].std()) if own[name].numel() > 1 else 0.0, 0.05)
        own[name] += 0.1 * spread * torch.randn(own[name].shape, generator=generator)
    tensors = {name: own[name] for name in plan.stored}
    tree = {"backbone": str(base), "methods": methods}
    save_adapter(path, tensors, tree=tree, identity=model.identity())
    return path


def _read(
    tool: str, checkout: Path | None, made: list[dict[str, Any]], *, python: str
) -> list[tuple[str, str, str, str]]:
    """What a tool makes of each export: (model, method, format, result)."""
    numbers = {"unet": 0, "transformer": 1}
    asked = [each for each in made if each["format"] in READS[tool][numbers[each["kind"]]]]
    command = [python, str(Path(__file__).with_name("_tool_reader.py")), tool, str(checkout)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line[:7] == "READER "]
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:120]
        answers += [{"error": f"not run: {reason}"}] * (len(asked) - len(answers))
    return [
        (each["kind"], each["what"], each["format"], answer)
        for each, answer in zip(asked, answers, strict=True)
    ]


def _table(rows: list[Any]) -> str:
    """A line for each tool, model and format: of how many adapters all weights are right, and what
    became of the others."""
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for tool, commit, kind, what, name, answer in rows:
        groups.setdefault((tool, commit, kind, name), {})[what] = answer
    lines = [
        "| tool | version | model | `format=` | read right | keys taken | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for (tool, commit, kind, name), own in groups.items():
        right = {what: each for what, each in own.items() if _is_right(each)}
        most = max((each["difference"] for each in right.values()), default=None)
        said = [] if most is None else [f"{most:.0e}"]
        said += [
            f"{what}: {each.get('error') or format(each['difference'], '.0e')}"
            for what, each in own.items()
            if what not in right
        ]
        counted = [each for each in own.values() if "taken" in each]
        taken, total = (sum(each[key] for each in counted) for key in ("taken", "total"))
        keys = f"{taken} of {total}" if counted else "-"
        lines.append(
            f"| {tool} | {commit} | {kind} | `{name}` | {len(right)} of {len(own)} | {keys} | "
            f"{'; '.join(said)} |"
        )
    return "\n".join(lines) + "\n"


def _is_right(answer: dict[str, Any]) -> bool:
    return "error" not in answer and answer["difference"] <= LIMIT


def _print_bars(rows: list[Any], bars: Bars) -> None:
    """A line for each tool: how many exports it reads with all weights right, of how many.
    `diffusers` is not made for UIs, so that they are not counted by it."""
    for tool in dict.fromkeys(row[0] for row in rows):
        own = [
            row[-1]
            for row in rows
            if row[0] == tool and (tool in ("diffusers", "peft") or row[4] != "diffusers")
        ]
        right = sum(map(_is_right, own))
        bars.exactly(f"read_right_by_{tool}", right, len(own))


if __name__ == "__main__":
    main()
