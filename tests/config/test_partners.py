"""An option whose partner is not as it needs it is refused where a user gave it, and nowhere else.
Every option of every section, data source and method is decided: it has a partner, it is refused by
its own record, or it acts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from trainer.config.load import load_recipe, recipe_names
from trainer.config.partners import flat, idle_options
from trainer.config.schema import SECTIONS, RecipeError
from trainer.data.source import Source
from trainer.methods.apply import find_method, method_names

LORA, WORLD = "recipe=lora", "recipe=linear_swap"
TWO = ["recipe=sequential_lora"]
# an option that has no effect -> the words that make it so, and what would give it one
IDLE = """
objective.logit_mean=1 -> objective.timesteps=uniform -> it is for logit_normal
objective.logit_std=2 -> objective.timesteps=uniform -> it is for logit_normal
objective.min_snr_gamma=5 -> -> objective.weighting is none; it is for min_snr
optim.final_lr=0.1 -> optim.schedule=constant -> optim.schedule is constant; it is for cosine
optim.eps=1e-6 -> optim.name=lion -> optim.name is lion, which has none
optim.warmup=9 -> run.steps=9 -> the run has 9 steps (run.steps)
optim.warmup=10 -> run.steps=9 -> the run has 9 steps (run.steps)
optim.lr=1e-4 -> optim.lrs={lora: 1e-3, new_token: 1e-3} -> has a learning rate of its own
run.keep_adapters=1 -> -> it is the run's own adapter
run.nonfinite_in_a_row=2 -> -> run.on_nonfinite=raise ends the run at once
run.nonfinite_total=2 -> -> run.on_nonfinite=raise ends the run at once
run.recompute_every=2 -> -> run.gradient_checkpointing=false calculates no whole blocks again
run.recompute_every=2 -> run.gradient_checkpointing=feed_forward -> calculates no whole blocks
run.offload_activations=true -> -> run.gradient_checkpointing=false calculates nothing again
run.timeouts.validate=60 -> run.validate_every=0 -> run.validate_every=0 never validates
run.timeouts={preview: 60} -> preview.every=0 -> there are no previews
run.cache_latents=true -> data.augment=true -> data.augment=true makes other pictures at every use
run.cache_text=true -> -> methods.new_token trains words
run.cache_text=true -> methods.new_token=null & methods.lora.text_encoder=[q] -> trains the text enc
preview.prompts=[a fox] -> preview.every=0 -> preview.every=0 makes no previews
preview.seed=3 -> preview.every=0 -> there are no previews
preview.negative=a cat -> preview.every=0 -> there are no previews
preview.negative=a cat -> preview.guidance=1 -> preview.guidance=1 does not guide
preview.temporal_guidance=2 -> -> it guides the frames of clips, and this run has pictures
evaluate.temporal_guidance=2 -> -> it guides the frames of clips, and this run has pictures
preview.maps=fox -> preview.prompts=[a <v1>] -> no prompt of the previews has fox
evaluate.negative=a cat -> evaluate.guidance=1 -> evaluate.guidance=1 does not guide
evaluate.together=['a {} by a {}'] -> -> it is for several concepts
continual.images=3 -> -> it is for continual.concepts
continual.judge=./clip -> -> it is for continual.concepts
data.prior_images=3 -> data.prior_weight=0 -> prior_weight=0 uses no class images
data.prior_prompts=[a fox] -> data.prior_weight=0 -> prior_weight=0 uses no class images
data.prior_seed=3 -> data.prior_weight=0 -> prior_weight=0 uses no class images
data.prior_steps=3 -> data.prior_images=0 -> prior_images=0 generates none
data.prior_guidance=3 -> data.prior_images=0 -> prior_images=0 generates none
data.prior_sampler=euler -> data.prior_images=0 -> prior_images=0 generates none
data.recursive=true -> -> a sprite has no files
data.caption_from=txt -> -> a sprite has no files
data.caption_lines=true -> -> a sprite has no files
data.shuffle_tags=true -> -> a sprite has no files
data.keep_tags=1 -> -> a sprite has no files
data.on_bad=skip -> -> no file is read; it is for folders of photos
data.validation=1 -> -> a sprite has scenes of its own for that
methods.lora.projections=[q] -> methods.lora.sites=null & methods.lora.layers=['*ff*'] -> sites=n
methods.lora.sites=self -> methods.lora.projections=[] & methods.lora.layers=['*ff*'] -> project
methods.c_lora.penalty=3 -> methods.lora=null -> task=0 has no earlier concept
methods.agent_attention.side=5 -> methods.agent_attention.agents=merged -> it is for pooled
methods.agent_attention.cell=5 -> methods.agent_attention.agents=pooled -> it is for merged
methods.agent_attention.ratio=0.5 -> methods.agent_attention.agents=pooled -> it is for merged
methods.agent_attention.share=0.5 -> methods.agent_attention.agents=pooled -> it is for merged
methods.agent_attention.query_power=0.5 -> methods.agent_attention.agents=pooled -> for merged
methods.agent_attention.shortcut=0.5 -> methods.agent_attention.agents=pooled -> it is for merged
methods.agent_attention.merge=0.5 -> methods.agent_attention.agents=pooled -> it is for merged
methods.agent_attention.later_cell=4 -> methods.agent_attention.agents=pooled -> it is for merged
methods.agent_attention.distill_until=0.5 -> methods.agent_attention.agents=pooled -> distill=0 does
methods.ditfastattn.pattern=[full] -> methods.ditfastattn.plan=p.json -> the plan says it
methods.ditfastattn.window=0.5 -> methods.ditfastattn.plan=p.json -> the plan says it
methods.ditfastattn.threshold=0.5 -> methods.ditfastattn.plan=p.json -> it is for `calibrate`
methods.ip_adapter.depth=2 -> -> form=pooled has no blocks; it is for form=resampler
methods.ip_adapter.heads=8 -> methods.ip_adapter.form=pooled -> it is for form=resampler
methods.ip_adapter.inner=64 -> methods.ip_adapter.form=pooled -> it is for form=resampler
methods.ip_adapter.form=resampler -> methods.ip_adapter.weights=a.safetensors -> the file of weights
methods.ip_adapter.count=8 -> methods.ip_adapter.weights=a.safetensors -> the file of weights
methods.ip_adapter.dropout=0.1 -> methods.ip_adapter.train=false -> nothing trains
methods.flashmask.tile=4 -> methods.flashmask.mask=causal -> it is for sliding_tiles and circle
methods.flashmask.reach=2 -> methods.flashmask.mask=circle -> it is for sliding_tiles
methods.flashmask.backend=dense -> methods.flashmask.mask=radial -> which has one
methods.gated_linear.distill_until=0.5 -> methods.gated_linear.scans=2 -> distill=0 does not
methods.sla.distill_until=0.5 -> methods.sla.block=8 -> distill=0 does not
methods.soft.distill_until=0.5 -> methods.soft.ratio=2 -> distill=0 does not
methods.linear_attention.num_features=5 -> methods.linear_attention.features=elu -> it is for random
methods.linear_attention.seed=5 -> methods.linear_attention.features=elu -> it is for random
methods.linear_attention.redraw=5 -> methods.linear_attention.features=elu -> it is for random
methods.linear_attention.distill_until=0.5 -> methods.linear_attention.distill=0 -> distill=0
methods.flashmask.size=9 -> methods.flashmask.mask=causal -> it is for sliding_window, windows
methods.p2p.threshold=0.4 ->  -> blend=false makes no mask
methods.p2p.blend_from=0.4 ->  -> blend=false makes no mask
methods.p2p.blend_tokens=64 ->  -> blend=false makes no mask
methods.p2p.self_tokens=64 -> methods.p2p.self_steps=null -> leaves self-attention as it is
methods.videop2p.threshold=0.4 -> methods.videop2p.blend=false -> blend=false makes no mask
methods.videop2p.blend_from=0.4 -> methods.videop2p.blend=false -> blend=false makes no mask
methods.videop2p.blend_tokens=64 -> methods.videop2p.blend=false -> blend=false makes no mask
methods.videop2p.self_tokens=64 -> methods.videop2p.self_steps=null -> leaves self-attention as it
methods.aid.way=inner -> methods.aid.steps=null -> looks at no end
methods.aid.sites=self -> methods.aid.steps=null -> looks at no end
methods.fam_diffusion.sites=self -> methods.fam_diffusion.weight=0 -> reads no native maps
methods.fam_diffusion.bank_limit=9 -> methods.fam_diffusion.weight=0 -> reads no native maps
methods.tf_icon.sites=self -> methods.tf_icon.steps=null -> composes no scores
methods.tf_icon.bank_limit=9 -> methods.tf_icon.steps=null -> composes no scores
methods.fec.sites=self -> methods.fec.steps=null -> takes no keys and values over
methods.fec.bank_tokens=9 -> methods.fec.scheme=noise -> keeps nothing before sampling
methods.fec.bank_limit=9 -> methods.fec.scheme=noise -> keeps nothing before sampling
methods.fec.offload=true -> methods.fec.scheme=noise -> keeps nothing before sampling
methods.infusion.features=up -> methods.infusion.feature_steps=null -> injects none
methods.infusion.strength=0.4 -> methods.infusion.feature_steps=null -> injects none
methods.infusion.sites=self -> methods.infusion.steps=null -> leaves them the edit's own
methods.infusion.threshold=0.4 -> methods.infusion.fuse=false -> makes no mask
methods.infusion.fuse_from=0.4 -> methods.infusion.fuse=false -> makes no mask
methods.infusion.mask_tokens=64 -> methods.infusion.fuse=false -> makes no mask
methods.pnp.sites=self -> methods.pnp.steps=null -> leaves them the edit's own
methods.pnp.features=up -> methods.pnp.feature_steps=null -> leaves them the edit's own
methods.masactrl.mask_words=[fox] -> methods.masactrl.share=mutual -> makes no masks
methods.masactrl.threshold=0.4 -> methods.masactrl.share=mutual -> makes no masks
methods.masactrl.mask_tokens=64 -> methods.masactrl.share=mutual -> makes no masks
methods.ditctrl.threshold=0.4 -> methods.ditctrl.mask_words=null -> makes no masks
methods.ditctrl.mask_tokens=64 -> methods.ditctrl.mask_words=null -> makes no masks
<shape>.keep_words=[fox] -> <shape>.keep_steps=null -> keeps
<shape>.keep_threshold=0.4 -> <shape>.keep_steps=null -> keeps
<shape>.segments=9 -> <shape>.background_at=null -> puts no
<shape>.segment_threshold=0.4 -> <shape>.background_at=null -> puts
methods.pix2video.share=0.4 -> methods.pix2video.weight=0 -> weight=0 pulls nothing together
methods.text2video_zero.smoothing=0.4 -> methods.text2video_zero.until=0.2 -> is not smoothed
methods.text2video_zero.threshold=0.4 -> methods.text2video_zero.until=0.2 -> is not smoothed
methods.tlora.singular=middle -> methods.lora=null & methods.tlora.init=zero -> no singular values
methods.tlora.power=2 -> methods.lora=null & methods.tlora.min_share=1 -> leaves the rank as it is
methods.tlora.timesteps=9 -> methods.lora=null & methods.tlora.min_share=1 -> leaves the rank as it
methods.imagen_video.kernel=5 -> methods.imagen_video.attention_from=1 -> attention everywhere
"""
IDLE = IDLE.replace("<shape>", "methods.object_shape_variations")
ROWS = [[part.strip() for part in line.split("->")] for line in IDLE.strip().splitlines()]
# options of other recipes and sources, in the tests below
ELSEWHERE = {
    "preview.every", "run.validate_every", "data.folder.keep_tags", "data.folder.repeats",
    "data.concept.token", "data.concept.class_word", "data.concept.prior_folder",
    "data.video.stride", "data.video.fps", "data.video.ignore", "data.video.frame_rate",
    "data.parquet.split", "data.stream.caption_lines",
    "data.world_clips.fps",
    "evaluate.beside", "evaluate.alone", "methods.new_token.tokens", "methods.new_token.init",
    *(f"methods.{name}.task" for name in ("coda_prompt", "inflora", "c_lora", "new_token")),
    *(f"methods.{name}.num_tasks" for name in ("coda_prompt", "inflora")),
}  # fmt: skip
# refused by a validator of their own record, or by the backbone, where the partner is missing
OWN = {
    "optim.muon_lr", "optim.lrs", "continual.tokens", "continual.class_words", "continual.inits",
    "data.video.images", "data.video.stills", "data.world_clips.images", "methods.flashmask.seen",
    "data.world_clips.any_moment",
    "text.max_tokens", "run.resolution", "objective.weighting", "data.folder.buckets",
    "parts.config", "parts.text_encoder_2", "run.base_precision",
}  # fmt: skip
# act whatever the others are
ALONE = """
parts: denoiser text_encoder tokenizer vae
objective: target path timesteps shift offset_noise caption_dropout
optim: name scale_lr betas weight_decay schedule clip ema
run: steps epochs batch_size accumulate seed device accelerator devices nodes precision workers
 gradient_checkpointing channels_last compile checkpoint_every checkpoint_keep
 on_disk_full
 on_nonfinite log_every out id start_from strategy
preview: steps scheduler guidance true_guidance
evaluate: steps guidance true_guidance known
continual: concepts
data.concept: concept augment flip prior_weight
data.folder: folder template on_bad validation flip recursive caption_from caption_lines
 shuffle_tags
data.parquet: parquet image_column caption_column validation on_bad buckets
data.remote: url validation on_bad buckets
data.shards: shards validation on_bad ignore buckets
data.stream: urls mixture shuffle caption_key validation per_shard ignore for_ranks for_workers
data.video: video prompt frames start flip validation on_bad
data.world: count sprites seed validation reference unnamed
data.world_clips: count frames sprites motion defect seed validation detail
methods.agent_attention: sites distill agents
methods.at_edm: sites ratio dense stride iterations
methods.animatediff: train weights heads max_frames mid norm
methods.cascade: train weights time space most level
methods.coda_prompt: pool length sites ortho
methods.ditfastattn: sites plan
methods.ediff_i: boxes masks sites strengths weight
methods.aid: steps concentration fused
methods.diffumask: mask_words threshold mask_tokens
methods.ditctrl: source sites steps mask_words word_weights
methods.fam_diffusion: factor weight low_pass
methods.fec: source scheme steps
methods.gaussctrl: own references sites steps
methods.infusion: source feature_steps steps fuse
methods.masactrl: source share sites steps
methods.object_shape_variations: source mix_steps keep_steps keep_tokens background_at
methods.pnp: source steps feature_steps
methods.shape_guided: source sites inside schedule background
methods.tf_icon: source steps background_until exceptional
methods.flash: sites backend
methods.flashmask: sites mask
methods.frame_interpolation: train weights between extrapolate blank fill
methods.full: denoiser text_encoder
methods.gated_linear: sites distill rank tau scans convolution
methods.gen1: train weights heads kernel max_frames structure
methods.imagen_video: train weights heads relative reach attention_from
methods.ip_adapter: encoder sites joint scale scales weights train
methods.linear_attention: sites distill features shortcut
methods.magicvideo: train weights heads max_frames renormalise fps
methods.make_a_video: train weights heads kernel max_frames fps
methods.nf4: min_size skip compute
methods.p2p: source sites edit cross_steps word_steps self_steps word_weights blend null_text
methods.pix2video: sites weight
methods.pva: encoder count depth heads inner sites dropout personalise
methods.selective: sites projections detach_first_token
methods.sla: sites distill block critical negligible
methods.soft: sites distill ratio iterations shortcut
methods.text2video_zero: sites motion alone until object
methods.tiled: sites rows columns
methods.tlora: min_share
methods.toma: sites ratio finest feed_forward proportional tile sharpness choose_every share_every
methods.tome: sites ratio finest feed_forward proportional cell seed
methods.tread: sites ratio first last seed
methods.tune_a_video: train weights sites
methods.vdm: train weights heads relative reach images
methods.videop2p: train weights sites edit cross_steps word_steps self_steps word_weights blend
 null_text
methods.word_embedding: tokens
"""
LOW_RANK = "layers text_encoder text_layers rank alpha dropout ranks alphas rslora init group "
LOW_RANK += "whole energy sites projections type options"
LOW_RANKS = (
    "c_lora", "controls", "domain_adapter", "dora", "inflora", "longlora", "lora",
    "peft_adapter", "tlora",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a fox")
    return tmp_path


def refusal(*words: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(words)
    return str(caught.value)


def recipe_for(key: str) -> str:
    """A recipe in which the option can stand: temporal ones are for clips."""
    names = ("imagen_video", "agent_attention", "linear_attention", "gated_linear", "flashmask",
             "pix2video", "sla", "soft", "text2video_zero")  # fmt: skip
    return WORLD if any(f".{name}." in key for name in names) else LORA


@pytest.mark.parametrize(("option", "words", "says"), ROWS, ids=[" ".join(r[:2]) for r in ROWS])
def test_an_option_without_effect_is_refused(option: str, words: str, says: str) -> None:
    recipe = recipe_for(option)
    others = [word for word in words.split(" & ") if word]
    if "linear_attention" not in option and recipe == WORLD:
        others.append("methods.linear_attention=null")
    said = refusal(recipe, option, *others)
    assert says in said, said
    assert said.startswith(option.split("=")[0]) and "has no effect" in said


def test_every_option_is_decided() -> None:
    known = {f"{name}.{key}" for name, cls in SECTIONS.items() for key in cls.model_fields}
    for name in Source.names():
        known |= {f"data.{name}.{key}" for key in Source.find(name).model_fields}
    for name in method_names():
        known |= {f"methods.{name}.{key}" for key in find_method(name).model_fields}
    decided = ELSEWHERE | OWN
    for option, *_ in ROWS:
        key = option.split("=")[0]
        parts = key.split(".")
        key = ".".join(parts[:2]) if parts[0] == "run" else key
        decided.add(key.replace("data.", "data.concept.") if parts[0] == "data" else key)
    for line in ALONE.strip().replace("\n ", " ").splitlines():
        name, _, keys = line.partition(": ")
        decided |= {f"{name}.{key}" for key in keys.split()}
    decided |= {f"methods.{name}.{key}" for name in LOW_RANKS for key in LOW_RANK.split()} & known
    assert known - decided == set(), "decide which partner these have"
    assert decided - known == set(), "these are no options any more"


@pytest.mark.parametrize("words", [
    ["optim.final_lr=0.1"], ["objective.timesteps=uniform"], ["run.steps=9"], ["optim.warmup=0"],
    ["run.checkpoint_every=0", "run.checkpoint_keep=9"], ["optim.schedule=constant"],
    ["data.prior_weight=0"],
    ["data.prior_images=0", "data.prior_weight=0"], ["preview.every=0"],
    ["preview.prompts=[a fox]"],
    ["run.on_nonfinite=skip", "run.nonfinite_total=2"], ["optim.warmup=3", "run.steps=4"],
    ["objective.weighting=min_snr", "objective.min_snr_gamma=2"], ["evaluate.together=[]"],
    ["run.base_precision.text_encoders=bf16"],
])  # fmt: skip
def test_what_has_its_partner_or_was_not_given_passes(words: list[str]) -> None:
    """What a recipe says of its own is not refused where a user takes its partner away."""
    assert load_recipe([LORA, *words])


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_never_refused(name: str, photos: Path) -> None:
    assert load_recipe(
        [f"recipe={name}", *([f"data.folder={photos}"] if name == "lora_folder" else [])]
    )


def test_options_of_a_folder_of_photos(photos: Path) -> None:
    words = ["recipe=lora_folder", f"data.folder={photos}"]
    assert "shuffle_tags=false leaves tags" in refusal(*words, "data.keep_tags=1")
    assert load_recipe([*words, "data.keep_tags=1", "data.shuffle_tags=true"])
    assert "run.steps says how long the run is" in refusal(*words, "data.repeats=2")
    assert load_recipe([*words, "data.repeats=2", "run.epochs=3"])


def test_a_backbone_without_text_encoders_holds_none() -> None:
    words = ["backbone=dit_xl", "methods.new_token=null", "data.prior_weight=0", "data.token=a"]
    for option in ("run.base_precision.text_encoders=bf16", "run.base_precision={text_encoders: "
                   "bf16, denoiser: fp8}"):  # fmt: skip
        assert "has no effect: this backbone has no text encoder" in refusal(LORA, *words, option)
    assert load_recipe([LORA, *words, "run.base_precision.denoiser=fp8"])


def test_a_validation_loss_needs_samples_that_are_held_out(photos: Path) -> None:
    words, every = ["recipe=lora_folder", f"data.folder={photos}"], "run.validate_every=5"
    Image.new("RGB", (32, 32)).save(photos / "b.png")
    (photos / "b.txt").write_text("a dog")
    assert "no sample is held out for the validation loss; give data.validation" in refusal(
        *words, every
    )
    assert "no sample is held out" in refusal(*words, "run.timeouts.validate=5")
    assert load_recipe([*words, every, "data.validation=1"])
    assert load_recipe([LORA, every])  # a sprite has scenes for it
    one = [LORA, f"data.concept={photos}", "data.class_word=fox", "data.token=a", every]
    one += ["methods.new_token=null", "preview.every=0", "data.prior_weight=0"]
    assert "no sample is held out" in refusal(*one)  # of two photos
    assert load_recipe([*one, "data.validation=1"])
    assert "no sample is held out" in refusal(WORLD, every, "data.validation=0")


def test_tasks_take_the_place_of_some_options() -> None:
    for word in ("data.token=<x>", "methods.new_token.tokens=[<v1>, <x>]", "methods.c_lora.task=1"):
        assert "has no effect: " in refusal("recipe=c_lora", word)
    inits = "continual.inits=[thing, thing, thing, thing, thing]"
    assert "sets it for each" in refusal("recipe=c_lora", inits, "methods.new_token.init=fox")
    words = "continual.class_words=[a, b, c, d, e]"
    assert "continual.class_words" in refusal("recipe=c_lora", words, "data.class_word=fox")
    assert load_recipe(["recipe=c_lora", "methods.c_lora.penalty=3"])  # the second task has one


def mine(folder: Path, tree: dict[str, Any]) -> str:
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree))
    return f"recipe={folder / 'mine.yaml'}"


def test_a_file_of_the_users_is_held_to_it_alone(tmp_path: Path) -> None:
    tree = {"base": "lora", "objective": {"logit_mean": 2.0}}
    assert load_recipe([mine(tmp_path, tree)])  # the base draws logit_normal
    assert load_recipe([mine(tmp_path, tree), "objective.timesteps=uniform"])  # tried for once
    tree["backbones"] = {"tiny": {"objective": {"timesteps": "uniform"}}}
    said = refusal(mine(tmp_path, tree))
    assert said.startswith("objective.logit_mean=2.0 has no effect: objective.timesteps is uniform")
    assert load_recipe([mine(tmp_path, tree), "objective.timesteps=logit_normal"])


def test_clips_and_folders(tmp_path: Path) -> None:
    video = {"data": {"source": "video", "video": str(tmp_path), "prompt": "a fox"},
             "methods": {"full": {}}}  # fmt: skip
    (tmp_path / "a.mp4").write_bytes(b"x")
    words = [mine(tmp_path, video)]
    assert load_recipe([*words, "preview.every=5", "preview.seed=3"])  # of the captions
    assert "preview.every=5 has no effect: there is nothing to show" in refusal(
        *words, "preview.every=5", "data.frames=1"
    )
    assert "preview.seed=3 has no effect: there are no previews" in refusal(
        *words, "preview.seed=3", "preview.prompts=[]"
    )
    assert load_recipe([*words, "preview.every=5", "preview.prompts=[]"])
    assert "it is for .tar files" in refusal(*words, "data.ignore=[cls]")
    for word in ("data.stride=2", "data.fps=4"):
        assert "takes single frames" in refusal(*words, "data.frames=1", word)
    assert "it is for a concept" in refusal(*words, "evaluate.beside=[a fox by a cat]")
    assert "clips are generated for the captions" in refusal(*words, "evaluate.alone=[a fox]")
    clips = ["recipe=animatediff", "preview.temporal_guidance=2", "evaluate.temporal_guidance=2"]
    assert load_recipe(clips)
    for name in ("preview", "evaluate"):
        said = refusal(*clips, f"{name}.guidance=1")
        assert (
            said.startswith(f"{name}.temporal_guidance=2") and "guidance=1 does not guide" in said
        )
    one = ["recipe=animatediff", "methods.animatediff=null", "data.frames=1", "data.fps=1"]
    assert "data.fps=1 has no effect: data.frames=1 takes single frames" in refusal(*one)
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    own = [LORA, f"data.concept={tmp_path}", "data.class_word=fox", f"data.prior_folder={tmp_path}"]
    assert "prior_weight=0 uses no class images" in refusal(*own, "data.prior_weight=0")
    assert "data.prior_images=9 has no effect: the class images are" in refusal(
        *own, "data.prior_images=9"
    )
    assert "give one, the caption" in refusal(*own, "data.prior_prompts=[a, b]")
    assert load_recipe([*own, "data.prior_prompts=[a fox]", "data.on_bad=skip"])


def test_idle_options_are_named_in_full() -> None:
    recipe = load_recipe([LORA, "optim.schedule=constant"])
    assert "optim.final_lr" in idle_options(recipe, [recipe])
    assert dict(flat({"a": {"b": {"c": 1}}, "d": 2})) == {
        "a.b.c": 1, "a.b": {"c": 1}, "a": {"b": {"c": 1}}, "d": 2,
    }  # fmt: skip
