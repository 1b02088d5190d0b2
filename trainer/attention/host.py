"""The host of a denoiser's attention: a hosted processor on every classic layer, a hosted call in
every other (`dispatch.py`), and which ops are where."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from trainer.attention.context import BoundCheckpoint, ContextHolder, bound, completed, current
from trainer.attention.denoiser_traits import UNDECLARED, DenoiserTraits
from trainer.attention.dispatch import HOSTED, HostedLayer
from trainer.attention.feed_forward import FeedRun, feed_forward_of
from trainer.attention.find_attention import is_classic
from trainer.attention.insertion import insertions
from trainer.attention.op import Op, has_stage, label
from trainer.attention.op_conflicts import refuse_conflicts
from trainer.attention.processor import HostedProcessor
from trainer.attention.sites import Site, scan, unet_divisors

__all__ = ["Host", "HostedProcessor", "Op"]

_HOST = "_attention_host"
FEEDS = ("feed", "fed")
_CHECKPOINT = "_gradient_checkpointing_func"  # where diffusers keeps it on every block
Hosted = HostedProcessor | HostedLayer


class Host:
    """Use `Host.attach(denoiser)`, not the constructor.

    Deep-copying the denoiser copies its host, ops and hooks along; `Host.attach(copy)` returns the
    copy's host.
    """

    def __init__(self, denoiser: nn.Module, traits: DenoiserTraits) -> None:
        self.denoiser, self.traits = denoiser, traits
        self.holder = ContextHolder()
        self.sites: list[Site] = []
        self.processors: dict[str, Hosted] = {}
        self.unproven = False
        self.parameters = list(inspect.signature(denoiser.forward).parameters)
        self.handles = [
            denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            denoiser.register_forward_hook(self._after),
        ]

    @classmethod
    def attach(cls, denoiser: nn.Module, traits: DenoiserTraits | None = None) -> Host:
        """The host of a denoiser, made at the first call; later calls take in sites added since.

        traits: what the denoiser's family declares of it. Without them those of the first call
        stay, or there are none, and only diffusers' plain processors are hosted.
        """
        host = denoiser.__dict__.get(_HOST)
        known = UNDECLARED if host is None else host.traits
        sites = scan(denoiser, traits or known)
        if not (sites or unet_divisors(denoiser)):  # a U-Net may have been made without any
            raise ValueError(
                f"{type(denoiser).__name__} has no attention layer to host; choose another backbone"
            )
        if host is None:
            host = denoiser.__dict__[_HOST] = cls(denoiser, known)
        host.traits = traits or known
        host._take(sites)
        return host

    @property
    def needs_grad(self) -> bool:
        """Whether an op needs gradients where a sampler would run without."""
        return any(op.traits.grad for p in self.processors.values() for op in p.ops)

    def require_rows(self, who: str) -> None:
        """Raises `ValueError` for who needs frames as rows, where the model has them as tokens."""
        if self.traits.layout != "rows":
            raise ValueError(
                f"{who} needs every frame of a clip as a row of the batch, and "
                f"{type(self.denoiser).__name__} has frames as tokens, so it is a model of clips; "
                "choose a backbone of images"
            )

    def install(self, op: Op, sites: Sequence[Site]) -> None:
        """Adds an op to sites; an op that is an `nn.Module` becomes `<site>.<op.name>`.

        Raises `ValueError`, and changes nothing, if there is no site, a site is not hosted here,
        the op is there already, its name is taken, or another op there excludes it.
        """
        if not sites:
            raise ValueError(f"op {op.name!r} was given no site; widen its selector")
        if op.traits.frames:
            self.require_rows(label(op))
        hosted = [self._hosted(site) for site in sites]
        for processor in hosted:
            if not any(other is op for other in processor.ops):
                refuse_conflicts((*processor.ops, op), processor.site)
            _refuse_name(op, processor)
            if has_stage(op, "block"):
                self._block(processor.site, op)
            if any(has_stage(op, stage) for stage in FEEDS):
                self._feed_forward(processor.site, op)
        for processor in hosted:
            self._set_ops(processor, (*processor.ops, op))
            if isinstance(op, nn.Module):
                processor.site.module.add_module(op.name, op)
        self.unproven = True

    def remove(self, op: Op) -> None:
        """Takes an op off all its sites; `ValueError` if it is on none."""
        hosted = [p for p in self.processors.values() if any(o is op for o in p.ops)]
        if not hosted:
            raise ValueError(f"op {op.name!r} is installed on no site of this denoiser")
        for processor in hosted:
            self._set_ops(processor, tuple(o for o in processor.ops if o is not op))
            if isinstance(op, nn.Module):
                delattr(processor.site.module, op.name)

    def detach(self) -> None:
        """Removes all ops and hooks and puts back the processors that were there before. Blocks
        that were inserted stay, and treat every batch as images until a host is attached again."""
        for op in {id(op): op for p in self.processors.values() for op in p.ops}.values():
            self.remove(op)
        for processor in self.processors.values():
            processor.release()
        for module in self.denoiser.modules():
            function = module.__dict__.get(_CHECKPOINT)
            if isinstance(function, BoundCheckpoint):
                module.__dict__[_CHECKPOINT] = function.inner
        for inserted in insertions(self.denoiser):
            inserted.holder = ContextHolder()
        for handle in self.handles:
            handle.remove()
        del self.denoiser.__dict__[_HOST]

    def _take(self, sites: list[Site]) -> None:
        self.sites = sites
        known, self.processors = self.processors, {}
        for site in sites:
            hosted = self._host_of(site, known.get(site.name))
            if hosted is None:
                continue
            # a block copied from elsewhere in the model has that block's host: use it here
            hosted.site, hosted.holder = site, self.holder
            self._set_ops(hosted, hosted.ops)
            self.processors[site.name] = hosted
        for inserted in insertions(self.denoiser):
            inserted.holder = self.holder
        # a site that lost its processor stays listed while it has ops, to be reported
        self.processors |= {n: p for n, p in known.items() if p.ops and n not in self.processors}
        self.unproven = any(p.ops for p in self.processors.values())
        self.checkpointing = [
            m for m in self.denoiser.modules() if hasattr(m, "gradient_checkpointing")
        ]

    def _host_of(self, site: Site, known: Hosted | None) -> Hosted | None:
        """The host of one layer: a processor, or the layer's own with its attention call taken;
        None where neither does what the layer does."""
        module: Any = site.module
        own = module.__dict__.get(HOSTED)
        processor = getattr(module, "processor", None)
        if isinstance(processor, HostedProcessor):
            return processor
        classic = is_classic(module, self.traits)
        if own is not None and (own.ops or not classic):
            return own
        if classic:
            if own is not None:
                own.release()
            if known is None or known.site.module is not module or isinstance(known, HostedLayer):
                known = HostedProcessor(site, self.holder, processor)
            module.set_processor(known)
            return known
        # ops of a hosted processor that another has replaced: what they did is to be reported
        if site.keeps_processor and not (known is not None and known.ops):
            return HostedLayer(site, self.holder)
        return None

    def _set_ops(self, processor: Hosted, ops: tuple[Op, ...]) -> None:
        """Sets them, and hooks the block around the site, and its feed-forward layer, while one of
        them needs it."""
        for hook in processor.hooks:
            hook.remove()
        processor.hooks = []
        processor.set_ops(ops)
        if around := [op for stage in FEEDS for op in processor.stages[stage]]:
            layer = self._feed_forward(processor.site, around[0])
            processor.hooks += FeedRun(processor).hooks(layer)
        if after := processor.stages["block"]:
            block = self._block(processor.site, after[0])
            processor.hooks.append(block.register_forward_hook(processor.after_block))

    def _block(self, site: Site, op: Op) -> nn.Module:
        """The module whose forward runs the site: its parent, unless that is only a list."""
        block = self.denoiser.get_submodule(site.name.rpartition(".")[0])
        if block is self.denoiser or type(block).forward is nn.Module.forward:
            raise ValueError(
                f"op {op.name!r} acts after the block around a site, and {site.name!r} is inside "
                "none; choose sites inside transformer blocks"
            )
        return block

    def _feed_forward(self, site: Site, op: Op) -> nn.Module:
        """The feed-forward layer of the block whose forward runs the site."""
        layer = feed_forward_of(self._block(site, op))
        if layer is None:
            raise ValueError(
                f"op {op.name!r} acts around a feed-forward layer that computes every token by "
                f"itself, and the block around {site.name!r} has none; choose other sites"
            )
        return layer

    def _hosted(self, site: Site) -> Hosted:
        processor = self.processors.get(site.name)
        if processor is not None and processor.site.module is site.module:
            return processor
        if any(site.module is own.module for own in self.sites):
            raise ValueError(
                f"{site.name!r} runs {type(site.module.processor).__name__}, which is not "
                "hosted: it makes no attention call that ops could act in; choose other sites, or "
                "call set_attn_processor(AttnProcessor2_0()) before Host.attach if that is what "
                "the model was trained with"
            )
        raise ValueError(
            f"{site.name!r} is no site of this denoiser; choose from the `sites` of its host"
        )

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = dict(zip(self.parameters, args, strict=False)) | dict(kwargs)
        self.holder.ctx = completed(current(), call, module.training)
        for block in self.checkpointing:
            if block.gradient_checkpointing:
                block.__dict__[_CHECKPOINT] = bound(block.__dict__[_CHECKPOINT], self.holder)
        if self.unproven:
            for processor in self.processors.values():
                processor.reached = False

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        if not self.unproven:
            return
        unseen = [p.site for p in self.processors.values() if p.ops and not p.reached]
        # temporal layers do not run on images
        still = self.holder.ctx.frames == 1
        missed = [site.name for site in unseen if not (still and site.kind == "temporal")]
        if missed:
            raise RuntimeError(
                "attention ops are installed on sites that the forward of "
                f"{type(module).__name__} never reached: {', '.join(missed)}. Either the model "
                "skips them, then choose other sites, or their processors were replaced after "
                "Host.attach (set_attn_processor, xformers, fused projections), then attach last, "
                "or another attention backend than torch's own is set, then unset it"
            )
        self.unproven = bool(unseen)


def _refuse_name(op: Op, processor: Hosted) -> None:
    if any(other is op or other.name == op.name for other in processor.ops):
        raise ValueError(
            f"op {op.name!r} is already on {processor.site.name!r}; remove it first or rename it"
        )
    if isinstance(op, nn.Module) and hasattr(processor.site.module, op.name):
        raise ValueError(
            f"op {op.name!r} cannot be registered at {processor.site.name!r}: the layer has an "
            "attribute of that name; rename the op"
        )
