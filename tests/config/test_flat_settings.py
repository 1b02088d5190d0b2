"""The options of a recipe as trackers list them."""

from __future__ import annotations

from trainer.config.flat_settings import flat_settings
from trainer.config.load import load_recipe


def test_every_option_has_its_full_key_and_a_plain_value() -> None:
    words = ["optim.lrs={vdm: 0.003}", "run.steps=7", "preview.prompts=[a, ü]"]
    own = flat_settings(load_recipe(["recipe=vdm", *words]))
    given = {
        "recipe": "vdm", "backbone": "tiny", "data.source": "world_clips", "data.images": 0.33,
        "optim.lr": 5e-4, "optim.lrs.vdm": 0.003, "run.steps": 7, "preview.prompts": '["a", "ü"]',
        "methods.vdm.images": "self", "methods.lora.rank": 16,
    }  # fmt: skip
    defaults = {"run.accumulate": 1, "optim.eps": 1e-8, "run.cache_text": True}
    empty = {"optim.muon_lr": "null", "run.timeouts": "{}", "evaluate.alone": "[]"}
    assert {key: own[key] for key in given | defaults | empty} == given | defaults | empty
    assert all(type(value) in (str, int, float, bool) for value in own.values())
    assert type(own["run.steps"]) is int and own["run.cache_text"] is True
