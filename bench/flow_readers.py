"""LoRA of transformers on a flow, as `export` writes it, read by the tools' own code.

    python bench/flow_readers.py --comfyui ~/ComfyUI --sd-scripts ~/sd-scripts
    python bench/flow_readers.py --musubi-tuner ~/musubi-tuner

Each option names a checkout; the tool's code runs in a process of its own, with the python that
`--python comfyui=<python>` names for it. Every family's tiny folder gets a random LoRA of all
layers that a format has names for, text encoders included where the tool has names for them; the
tool adds the file to its own weights, made of the plain ones, and each is compared with ours.
ComfyUI's places of the layers are those of its own tables, and of its own network where it has no
table; sd-scripts and musubi-tuner build their own network. Prints a table and a BAR line for each
tool. Nothing of the tools is copied.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from _common import Bars, parser_of, version_of  # noqa: E402
from chat_folders import QWEN_IMAGE, Z_IMAGE, flux2_pipeline, qwen_image_pipeline, z_image_pipeline  # noqa: E402
from flow_folders import (  # noqa: E402
    chroma_pipeline,
    flux1_pipeline,
    make_flow_folder,
    sd3_pipeline,
)
from safetensors.torch import save_file  # noqa: E402
from video_folders import LTX, WAN, make_video_folder  # noqa: E402

from trainer.backbones import load_backbone  # noqa: E402
from trainer.config.lineage import backbone_spec  # noqa: E402
from trainer.export.apply_bundle import add_to, layer_at  # noqa: E402
from trainer.export.bundle import Bundle, LowRankDelta  # noqa: E402
from trainer.export.card import Card  # noqa: E402
from trainer.export.find_format import find_format  # noqa: E402
from trainer.export.job import Job  # noqa: E402
from trainer.export.layer_names import (  # noqa: E402
    comfy,
    kohya,
    kohya_fused,
    numbered,
    original_names,
    tool_names,
)

LIMIT = 1e-6
# of the networks, by the names that a tool gives its own options
FLUX = {
    "hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "mlp_ratio": 4.0,
    "in_channels": 16, "context_in_dim": 40, "vec_in_dim": 16, "axes_dim": [4, 4, 8],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
FLUX2 = {
    "hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "mlp_ratio": 3.0,
    "in_channels": 16, "context_in_dim": 48, "axes_dim": [4, 4, 4, 4], "use_guidance_embed": False,
}  # fmt: skip
SD3 = {
    "depth": 2, "input_size": None, "in_channels": 4, "adm_in_channels": 24, "num_patches": 576,
    "pos_embed_max_size": 24, "context_embedder_in_features": 40, "qk_norm": "rms",
    "context_embedder_out_features": 128, "x_block_self_attn_layers": [0],
}  # fmt: skip
WIDE = {"attention_head_dim": 64, "caption_projection_dim": 128}  # 64 a block, as published
SIZES = {
    "n_layers": 2, "dim": 32, "n_refiner_layers": 1,
    "depth": 2, "depth_single_blocks": 2, "hidden_size": 32,
}  # fmt: skip
MAKE: dict[str, Callable[[Path], Path]] = {
    "sd3": lambda path: make_flow_folder(path, sd3_pipeline, **WIDE),
    "flux1": lambda path: make_flow_folder(path, flux1_pipeline),
    "chroma": lambda path: make_flow_folder(path, chroma_pipeline),
    "flux2": lambda path: make_flow_folder(path, flux2_pipeline),
    "z_image": lambda path: make_flow_folder(path, z_image_pipeline),
    "qwen_image": lambda path: make_flow_folder(path, qwen_image_pipeline),
    "wan": lambda path: make_video_folder("wan", path),
    "ltx": lambda path: make_video_folder("ltx", path),
}
WAN_SIZES = {
    "dim": WAN["num_attention_heads"] * WAN["attention_head_dim"], "num_heads": 2, "num_layers": 2,
    **{name: WAN[name] for name in ("text_dim", "freq_dim", "ffn_dim")},
    "in_dim": WAN["in_channels"], "out_dim": WAN["out_channels"],
}  # fmt: skip
# the network that each tool builds: empty where it has a table of names
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "comfyui": {
        "sd3": {}, "flux1": {}, "chroma": {}, "flux2": {}, "z_image": {}, "qwen_image": QWEN_IMAGE,
        "wan": WAN_SIZES, "ltx": {k: v for k, v in LTX.items() if k != "out_channels"},
    },
    "sd-scripts": {"sd3": SD3, "flux1": FLUX},
    "musubi-tuner": {
        "qwen_image": QWEN_IMAGE, "z_image": Z_IMAGE, "flux2": FLUX2, "wan": WAN_SIZES
    },
}  # fmt: skip
FORMATS = {
    "comfyui": ("comfyui", "diff"), "sd-scripts": ("kohya",), "musubi-tuner": ("kohya",),
}  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__)
    for tool in NETWORKS:
        parser.add_argument(f"--{tool}", type=Path, help=f"a checkout of {tool}")
    parser.add_argument("--python", action="append", default=[], help="tool=python, for one tool")
    options = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in options.python)
    bars = Bars("flow_readers", options.quick, update=True)
    with tempfile.TemporaryDirectory() as folder:
        made = {name: Made(name, Path(folder) / name) for name in MAKE}
        for tool, networks in NETWORKS.items():
            checkout = getattr(options, tool.replace("-", "_"))
            if checkout is not None:
                cases = [case for name in networks for case in made[name].cases(tool)]
                python = pythons.get(tool, sys.executable)
                rows = _read(tool, checkout, cases, python=python)
                bars.note(f"{tool}_version", version_of(tool, checkout))
                _print(tool, rows, bars)
    bars.write()


class Made:
    """The folder of a family, and the adapters of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, MAKE[name](folder)
        self.base = self.load()

    def load(self) -> Any:
        model = load_backbone(backbone_spec(str(self.folder)), str(self.folder))
        return model.eval().requires_grad_(False)

    def cases(self, tool: str) -> list[dict[str, Any]]:
        return [self._case(tool, name) for name in FORMATS[tool]]

    def _case(self, tool: str, format_name: str) -> dict[str, Any]:
        folder = self.folder.parent / f"{self.name}_{tool}_{format_name}"
        folder.mkdir()
        bundle = self._bundle(format_name)
        job = Job(self.base, self.load, (), title="lora", given=bundle, card=Card())
        find_format(format_name).write(job, folder, torch.float32)
        wanted = folder.with_suffix(".wanted"), folder.with_suffix(".base")
        for path, model in zip(wanted, (add_to(self.load(), bundle), self.base), strict=True):
            tensors = {k: v.detach().contiguous() for k, v in model.named_parameters()}
            save_file(tensors, path)
        part = self.base.denoiser_name
        scripts = tool_names(self.base.denoiser).scripts
        tables = {
            "original": original_names(self.base.denoiser),
            "scripts": numbered(scripts.layers, self.base.denoiser) if scripts else {},
        }
        tables = {
            kind: {key: [f"{part}.{layer}" for layer in own] for key, own in table.items()}
            for kind, table in tables.items()
        }
        sizes = SIZES | ({"hidden_size": 128} if self.name == "sd3" else {})
        return {
            "family": self.name, "format": format_name, "file": str(folder / "lora.safetensors"),
            "wanted": str(wanted[0]), "base": str(wanted[1]), "layers": sorted(bundle.layers),
            "sizes": sizes, "network": NETWORKS[tool][self.name], **tables,
            "clip": self._places_of_text(bundle), "parts": list(self.base.text_encoders),
            "encoders": [str(self.folder / name) for name in self.base.text_encoders],
        }  # fmt: skip

    def _bundle(self, format_name: str) -> Bundle:
        """A LoRA of rank 2 on every layer that the format has a name for."""
        if format_name == "kohya":
            known = kohya(self.base).keys() | {
                path for paths in kohya_fused(self.base).values() for path in paths
            }
        else:
            known = comfy(self.base).keys()
        generator = torch.Generator().manual_seed(1)
        layers = {}
        for path in sorted(known):
            rows, *width = layer_at(self.base, path).weight.shape
            down = 0.3 * torch.randn(2, *width, generator=generator)
            up = 0.3 * torch.randn(rows, 2, generator=generator)
            layers[path] = LowRankDelta(down, up.view(rows, 2, *[1] * (len(width) - 1)), 0.5)
        return Bundle(layers, {})

    def _places_of_text(self, bundle: Bundle) -> dict[str, str]:
        """ComfyUI's names of the layers of text encoders."""
        found = {}
        for number, (part, encoder) in enumerate(self.base.text_encoders.items()):
            kind = "t5xxl" if "T5" in type(encoder).__name__ else ("clip_l", "clip_g")[number]
            level = "" if kind == "t5xxl" else "text_model."
            for path in bundle.layers:
                if path.startswith(f"{part}."):
                    name = path.removeprefix(f"{part}.").removeprefix("text_model.")
                    found[path] = f"{kind}.transformer.{level}{name}"
        return found


def _read(
    tool: str, checkout: Path, cases: list[dict[str, Any]], *, python: str
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    code = str(Path(__file__).with_name("_flow_reader.py"))
    command = [*python.split(), code, tool, str(checkout)]
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True)
    answers = [json.loads(line[7:]) for line in done.stdout.splitlines() if line[:7] == "READER "]
    if len(answers) < len(cases):
        print(done.stderr[-3000:], file=sys.stderr)
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1][:120]
        answers += [{"error": f"not run: {reason}"}] * (len(cases) - len(answers))
    return list(zip(cases, answers, strict=True))


def _print(tool: str, rows: list[tuple[dict[str, Any], dict[str, Any]]], bars: Bars) -> None:
    right = 0
    for case, answer in rows:
        good = answer.get("difference", 1.0) <= LIMIT and answer["taken"] == answer["total"]
        right += good
        said = answer.get("error") or (
            f"{answer['taken']} of {answer['total']} keys, {answer['difference']:.0e}"
        )
        print(f"{tool} | {case['family']} | {case['format']} | {said}", flush=True)
    bars.note(f"{tool}_cases", {f"{c['family']}_{c['format']}": a for c, a in rows})
    bars.exactly(f"flow_files_read_right_by_{tool}", right, len(rows))


if __name__ == "__main__":
    main()
