"""IP-Adapter: attention to reference pictures beside that to the text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from joint_models import JointBackbone
from safetensors.torch import save_file
from torch import Tensor

from trainer.attention.condition import Condition
from trainer.attention.context import StepContext, use
from trainer.attention.further_conditions import told_groups
from trainer.attention.op import Traits
from trainer.backbones.image_encoder import Seen, open_encoder
from trainer.common.paths import shipped
from trainer.config.load import methods_of
from trainer.data.loader import Batch
from trainer.diffusion.objective import Objective
from trainer.diffusion.sampler import sample
from trainer.diffusion.sampling_settings import Sampling
from trainer.methods.apply import Plan, apply_methods
from trainer.methods.feature.ip_adapter import IpAdapter
from trainer.ops.branches.ip_layout import BRANCH, IMAGE, sites_by_number
from trainer.ops.branches.projectors import PooledProjector, Resampler
from trainer.ops.ip_adapter import SCALES, SHARES, TOKENS
from trainer.training.tasks.denoise import Denoise

X_T = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(3))
PICTURES = torch.rand(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(4)) * 2 - 1


def applied(backbone: Any, **options: Any) -> Plan:
    return apply_methods(backbone, methods_of({"ip_adapter": options}))


def predicted(backbone: Any, **further: Tensor) -> Tensor:
    given = replace(backbone.encode_prompts(["a fox", ""]), further=further)
    t = torch.tensor([20, 700])
    with torch.no_grad(), use(StepContext(0, 1, t, condition=given)):
        output: Tensor = backbone.predict(X_T, t, given)
    return output


def tokens(backbone: Any, count: int = 1) -> Tensor:
    """Of `count` pictures with 4 tokens each, for two rows."""
    site = next(iter(backbone.host.processors.values()))
    ops = [op for p in backbone.host.processors.values() for op in p.ops]
    assert site is not None and ops
    width = ops[0].image.to_k.in_features
    return torch.randn(2, count, 4, width, generator=torch.Generator().manual_seed(9))


@pytest.fixture(params=["tiny_folder", "dit_folder"])
def backbone(request: pytest.FixtureRequest, open_folder: Callable[[Path], Any]) -> Any:
    return open_folder(request.getfixturevalue(request.param))


def test_without_a_reference_and_at_scale_0_it_is_the_base(backbone: Any) -> None:
    before = predicted(backbone)
    applied(backbone)
    assert torch.equal(predicted(backbone), before)
    own = tokens(backbone)
    assert torch.equal(predicted(backbone, **{TOKENS: own, SCALES: torch.zeros(2)}), before)
    seen = predicted(backbone, **{TOKENS: own, SCALES: torch.ones(2)})
    assert float((seen - before).abs().max()) > 1e-3


def test_a_site_computes_as_the_processor_of_diffusers(randomise: Any, tiny: Any) -> None:
    """Forward and gradient, with two pictures together, and with a mask for each."""
    randomise(tiny, applied(tiny, sites="cross & mid", scale=0.7))
    (hosted,) = (p for p in tiny.host.processors.values() if p.ops)
    op, attention, width = hosted.ops[0], hosted.site.module, hosted.site.heads
    x = torch.randn(2, 16, attention.to_q.in_features, requires_grad=True)
    text, own = torch.randn(2, 5, 128), torch.randn(2, 2, 4, 128)
    masks = torch.rand(2, 2, 4, 4)
    theirs = IPAdapterAttnProcessor2_0(x.shape[-1], 128, num_tokens=(4,), scale=0.7)
    theirs.to_k_ip[0].load_state_dict(op.image.to_k.state_dict())
    theirs.to_v_ip[0].load_state_dict(op.image.to_v.state_dict())
    for shares in (None, masks):
        further = {TOKENS: own, SCALES: torch.ones(2)}
        further |= {} if shares is None else {SHARES: shares}
        hosted.holder.ctx = StepContext(
            0, 1, torch.zeros(()), latent_size=(8, 8), condition=Condition(further=further)
        )
        found = attention(x, encoder_hidden_states=text)
        if shares is None:
            given, asked = own.flatten(1, 2)[:, None].flatten(1, 2), None
            wanted = theirs(attention, x, (text, [given]))
        else:
            rows = [
                theirs(attention, x[i : i + 1], (text[i : i + 1], [own[i : i + 1]]),
                       ip_adapter_masks=[shares[i : i + 1]])
                for i in range(2)
            ]  # fmt: skip
            asked, wanted = shares, torch.cat(rows)
        assert float((found - wanted).detach().abs().max()) < 2e-6, asked
        slopes = [torch.autograd.grad(each.square().sum(), x)[0] for each in (found, wanted)]
        assert float((slopes[0] - slopes[1]).abs().max()) < 2e-4 * float(slopes[1].abs().max())
    assert width == attention.heads and isinstance(attention, Attention)


def test_in_training_the_scale_is_1(randomise: Any, tiny: Any) -> None:
    randomise(tiny, applied(tiny, scale=0.0))
    further = {TOKENS: tokens(tiny), SCALES: torch.ones(2)}
    base = predicted(tiny)
    assert torch.equal(predicted(tiny, **further), base)
    given = replace(tiny.encode_prompts(["a fox", ""]), further=further)
    t = torch.tensor([20, 700])
    with torch.no_grad(), use(StepContext(0, 1, t, condition=given, training=True)):
        assert not torch.equal(tiny.predict(X_T, t, given), base)


def test_sites_have_scales_of_their_own(tiny: Any) -> None:
    applied(tiny, scale=0.5, scales={"down": 0.4, "name:*up_blocks.0*": 0, "up": 2})
    found = {
        name.partition(".")[0]: p.ops[0].image.scale
        for name, p in tiny.host.processors.items()
        if p.ops
    }
    assert found == {"down_blocks": 0.2, "mid_block": 0.5, "up_blocks": 1.0}


def test_projectors_are_those_of_diffusers() -> None:
    pooled, seen = PooledProjector(6, width=8, count=4), torch.randn(3, 6)
    theirs = ImageProjection(6, 8, 4)
    theirs.image_embeds.load_state_dict(pooled.proj.state_dict())
    theirs.norm.load_state_dict(pooled.norm.state_dict())
    assert torch.allclose(pooled(Seen(seen, seen)), theirs(seen), atol=1e-6)
    own = Resampler(6, width=8, count=5, inner=10, depth=2, heads=3)
    other = IPAdapterPlusImageProjection(6, 8, 10, 2, 64, 3, 5)
    with torch.no_grad():
        for parameter in own.parameters():  # norms begin alike, and no two stay so
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for block, (attention, feed) in zip(other.layers, own.layers, strict=True):  # type: ignore[misc, arg-type]
            block.ln0.load_state_dict(attention.norm1.state_dict())
            block.ln1.load_state_dict(attention.norm2.state_dict())
            block.attn.to_q.load_state_dict(attention.to_q.state_dict())
            for part, half in zip("kv", attention.to_kv.weight.chunk(2), strict=True):
                getattr(block.attn, f"to_{part}").weight.copy_(half)
            block.attn.to_out[0].load_state_dict(attention.to_out.state_dict())
            block.ff[0].load_state_dict(feed[0].state_dict())
            block.ff[1].net[0].proj.load_state_dict(feed[1].state_dict())
            block.ff[1].net[2].load_state_dict(feed[3].state_dict())
        for name in ("proj_in", "proj_out", "norm_out"):
            getattr(other, name).load_state_dict(getattr(own, name).state_dict())
        other.latents.copy_(own.latents)
    patches = torch.randn(3, 7, 6)
    assert torch.allclose(own(Seen(seen, patches)), other(patches), atol=1e-5)


def test_dropped_samples_see_what_stands_for_no_picture(tiny: Any) -> None:
    applied(tiny, form="resampler", heads=1, depth=1, inner=16)
    own = tiny.further_conditions["ip_adapter"]
    inputs = {"reference": PICTURES.expand(2, -1, -1, -1, -1)}
    mixed = own.encode(tiny, inputs, torch.tensor([True, False]))[TOKENS]
    encoder, projector = (tiny.extras[f"ip_adapter_{part}"] for part in ("encoder", "projector"))
    assert torch.allclose(mixed[0], projector(encoder(PICTURES[0])), atol=1e-5)
    assert torch.allclose(mixed[1, 1], projector(encoder.nothing(1))[0], atol=1e-5)
    assert not torch.allclose(mixed[0], mixed[1], atol=1e-2)


def test_guidance_by_the_picture_has_a_scale_of_its_own(tiny: Any) -> None:
    """With the scale of the text the two add up to plain guidance; with 0 the picture acts through
    the text's difference alone."""
    applied(tiny)
    settings = Sampling(steps=2, guidance=3)

    def painted(**more: Any) -> Tensor:
        chosen = replace(settings, **more)
        return sample(tiny, ["a fox"], [1], settings=chosen, inputs={"reference": PICTURES})

    plain = painted()
    assert float((painted(condition_guidance=3.0) - plain).abs().max()) < 1e-4
    assert float((painted(condition_guidance=0.0) - plain).abs().max()) > 1e-2


def test_a_share_of_training_samples_sees_no_picture(tiny: Any) -> None:
    applied(tiny, dropout=0.5)
    count = 16
    task = Denoise(tiny, Objective.of(tiny), seed=1)
    batch = Batch(
        step=0,
        positions=list(range(count)),
        captions=["a fox"] * count,
        keys=[""] * count,
        weights=torch.ones(count),
        moments=torch.zeros(count, 16, 4, 4),
        inputs={"reference": PICTURES[:, :1].expand(count, -1, -1, -1, -1)},
    )
    rows = task.encode(batch).condition.further[TOKENS]
    none = told_groups(tiny, Condition(), batch.inputs, sees=(False,)).further[TOKENS]
    dropped = sum(torch.allclose(row, none[0], atol=1e-5) for row in rows)
    assert 3 <= dropped <= 13
    checked = task.encode(batch, "validate").condition.further[TOKENS]
    assert not any(torch.allclose(row, none[0], atol=1e-5) for row in checked)


def layout_of(backbone: Any) -> dict[str, Tensor]:
    """A file as published, of the weights that a backbone has now."""
    projector = backbone.extras["ip_adapter_projector"]
    found = {f"{IMAGE}{name}": value.detach() for name, value in projector.named_parameters()}
    for number, site in sites_by_number(backbone.denoiser, backbone.sites):
        image = backbone.host.processors[site.name].ops[0].image
        found[f"{BRANCH}{number}.to_k_ip.weight"] = image.to_k.weight.detach()
        found[f"{BRANCH}{number}.to_v_ip.weight"] = image.to_v.weight.detach()
    return {name: value.clone().contiguous() for name, value in found.items()}


@pytest.mark.parametrize("form", ["pooled", "resampler"])
def test_published_files_are_read(
    form: str, tiny_folder: Path, open_folder: Any, randomise: Any, tmp_path: Path
) -> None:
    one = open_folder(tiny_folder)
    options = {"form": form, "heads": 2, "depth": 2, "inner": 24, "count": 4}
    randomise(one, applied(one, **options))
    save_file(layout_of(one), tmp_path / "file.safetensors")
    other = open_folder(tiny_folder)
    chosen = methods_of(
        {"ip_adapter": {"weights": str(tmp_path / "file.safetensors"), "train": False}}
    )
    plan = apply_methods(other, chosen, trains=False)
    assert not plan.names
    painted = [
        sample(each, ["a fox"], [1], settings=Sampling(steps=1), inputs={"reference": PICTURES})
        for each in (one, other)
    ]
    assert torch.equal(*painted)


def test_the_numbers_of_sites_are_those_of_diffusers(tiny: Any) -> None:
    """By the order in which its loader goes over the processors, the middle block last."""
    names = [name.removesuffix(".processor") for name in tiny.denoiser.attn_processors]
    cross = [name for name in names if name.endswith("attn2")]
    found = {number: site.name for number, site in sites_by_number(tiny.denoiser, tiny.sites)}
    assert found == {2 * index + 1: name for index, name in enumerate(cross)}
    assert list(found.values())[-1].startswith("mid_block")


def test_an_unfit_file_or_encoder_is_refused(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"has no image_proj"):
        applied(tiny, weights=str(path))
    with pytest.raises(ValueError, match=r"no such file"):
        applied(tiny, weights="none.safetensors")
    with pytest.raises(ValueError, match=r"train=false without weights"):
        apply_methods(tiny, methods_of({"ip_adapter": {"train": False}}), trains=False)
    with pytest.raises(ValueError, match=r"there is no config.json .* a CLIP or a DINO"):
        applied(tiny, encoder=str(tmp_path))
    for name in ("preprocessor_config.json", "a.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"its model is bert; give a CLIP or a DINO"):
        applied(tiny, encoder=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ValueError, match=r"config.json is no JSON .* get the model anew"):
        applied(tiny, encoder=str(tmp_path))


def test_a_damaged_encoder_is_refused(tiny: Any, tmp_path: Path) -> None:
    shutil.copytree(shipped("tiny") / "clip", tmp_path / "clip")
    given = tmp_path / "clip"
    weights = next(given.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"its weights cannot be read .* get the model anew"):
        applied(tiny, encoder=str(given))
    shutil.copy(next((shipped("tiny") / "clip").glob("*.safetensors")), weights)
    (given / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    with pytest.raises(ValueError, match=r"no image_std of three colours; get the model anew"):
        applied(tiny, encoder=str(given))


def test_a_file_of_another_encoder_or_backbone_says_so(
    tiny_folder: Path, open_folder: Any, tmp_path: Path
) -> None:
    one = open_folder(tiny_folder)
    applied(one)
    stored = layout_of(one)
    narrow = {"proj.weight": (384, 128), "proj.bias": (384,), "norm.weight": (96,)}
    other = {f"{IMAGE}{name}": torch.zeros(shape) for name, shape in narrow.items()}
    save_file(stored | other, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"norm.weight is .* trained for another backbone"):
        applied(open_folder(tiny_folder), weights=str(tmp_path / "file.safetensors"))
    stored[f"{IMAGE}proj.weight"] = torch.zeros(512, 77)
    save_file(stored, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"another encoder: give the one it was trained with"):
        applied(open_folder(tiny_folder), weights=str(tmp_path / "file.safetensors"))
    stored["ip_adapter.1.to_q_lora.down.weight"] = torch.zeros(1)
    save_file(stored, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=r"has no place here"):
        applied(open_folder(tiny_folder), weights=str(tmp_path / "file.safetensors"))


class Spy:
    """Keeps what passes an op's stages at one site."""

    traits = Traits()

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, Any] = {}

    def kv(self, q: Tensor, k: Tensor, v: Tensor, call: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.seen["k"], self.seen["v"] = k, v
        return q, k, v

    def branch(self, o: Tensor, q: Tensor, call: Any) -> Tensor:
        self.seen["o"], self.seen["q"], self.seen["call"] = o, q, call
        return o


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A plain loop over the rows and heads."""
    out = torch.zeros(*q.shape[:3], v.shape[-1])
    for row in range(len(q)):
        for head in range(q.shape[1]):
            scores = q[row, head] @ k[row, head].T / q.shape[-1] ** 0.5
            out[row, head] = scores.softmax(-1) @ v[row, head]
    return out


def joint_context(width: int, rows: int = 2) -> StepContext:
    own = torch.randn(rows, 1, 3, width, generator=torch.Generator().manual_seed(6))
    told = Condition(further={TOKENS: own, SCALES: torch.tensor([0.5, 2.0])})
    return StepContext(0, 1, torch.zeros(()), latent_size=(8, 8), text_tokens=8, condition=told)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_concatenated_at_joint_sites(name: str) -> None:
    """Image queries over the image's keys and the picture's normalised ones; text gets nothing."""
    backbone = JointBackbone(name)
    before, after = Spy("before"), Spy("after")
    site = backbone.sites[0]
    backbone.host.install(before, [site])
    chosen = {"ip_adapter": IpAdapter(sites="joint", scale=0.5)}
    apply_methods(backbone, chosen)  # type: ignore[arg-type]
    backbone.host.install(after, [site])
    base = backbone.output()
    (op,) = (op for op in backbone.host.processors[site.name].ops if op.name == "ip_adapter")
    with torch.no_grad():
        op.image.norm_k.weight.mul_(1.5)
    ctx = joint_context(op.image.to_k.in_features)
    with torch.no_grad(), use(ctx):
        assert not torch.equal(backbone.output(), base)
    assert ctx.condition is not None
    further, seen = ctx.condition.further, before.seen
    at = seen["call"].spans(seen["q"].shape[2]).image
    keys, values = (heads_of(layer(further[TOKENS][:, 0]), site.heads)
                    for layer in (op.image.to_k, op.image.to_v))  # fmt: skip
    keys = 1.5 * keys / (keys.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    k = torch.cat([seen["k"][:, :, at], keys], 2)
    v = torch.cat([seen["v"][:, :, at], values], 2)
    wanted = seen["o"].clone()
    strength = 0.5 * further[SCALES][:, None, None, None]
    wanted[:, :, at] += strength * attended(seen["q"][:, :, at], k, v)
    assert float((after.seen["o"] - wanted).detach().abs().max()) < 1e-5
    text = [i for i in range(wanted.shape[2]) if not at.start <= i < at.stop]
    assert torch.equal(after.seen["o"][:, :, text], seen["o"][:, :, text])


def test_added_at_joint_sites() -> None:
    """Queries before rotary positions over the picture's keys alone, after the projection."""
    backbone = JointBackbone("flux")
    chosen = {"ip_adapter": IpAdapter(sites="name:transformer_blocks.0.*", joint="added")}
    apply_methods(backbone, chosen)  # type: ignore[arg-type]
    site = next(site for site in backbone.sites if site.name.startswith("transformer_blocks.0."))
    (op,) = backbone.host.processors[site.name].ops
    got: list[Any] = []
    site.module.register_forward_hook(
        lambda _, args, kwargs, out: got.append((kwargs.get("hidden_states", *args[:1]), out[0])),
        with_kwargs=True,
    )
    ctx = joint_context(op.image.to_k.in_features)
    with torch.no_grad():
        backbone.output()
        with use(ctx):
            backbone.output()
    (x, plain), (same, seen) = got
    assert torch.equal(x, same) and ctx.condition is not None
    further = ctx.condition.further
    module: Any = site.module
    q = module.norm_q(module.to_q(x).unflatten(-1, (site.heads, -1))).transpose(1, 2)
    keys, values = (heads_of(layer(further[TOKENS][:, 0]), site.heads)
                    for layer in (op.image.to_k, op.image.to_v))  # fmt: skip
    wanted = attended(q, keys, values).transpose(1, 2).flatten(2)
    wanted = plain + further[SCALES][:, None, None] * wanted
    assert float((seen - wanted).detach().abs().max()) < 1e-5


def test_self_attention_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"self attention, which reads no text"):
        applied(tiny, sites="self")
    with pytest.raises(ValueError, match=r"scales: 'down' selects none"):
        applied(tiny, sites="cross & up", scales={"down": 0})


def test_pictures_of_any_shape_are_cut_to_the_encoders_square() -> None:
    encoder = open_encoder("tiny")
    wide = torch.rand(1, 3, 40, 100) * 2 - 1
    shown = F.interpolate(wide[..., 30:70], (64, 64), mode="bicubic", antialias=True)
    assert float((encoder(wide).pooled - encoder(shown).pooled).abs().max()) < 0.2
    whole = IpAdapter().encoder
    assert whole == "tiny" and encoder.pooled_width == 128 and encoder.token_width == 192
    assert encoder(wide).tokens.shape == (1, 65, 192)
