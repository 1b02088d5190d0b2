"""Methods that are given beside a trained adapter, for sampling alone."""

from __future__ import annotations

import pytest

from trainer.config.schema import RecipeError
from trainer.methods.feature.videop2p import VideoP2P
from trainer.methods.map.p2p import P2P
from trainer.runs.sampling_methods import sampling_methods

TRAINED = {"videop2p": {"sites": "self & up", "threshold": 0.5}, "lora": {"rank": 2}}


def test_options_of_sampling_are_laid_over_those_of_training() -> None:
    own, further = sampling_methods(TRAINED, {"videop2p": {"blend": ["fox"]}, "p2p": {}})
    assert list(own) == ["videop2p", "lora"]
    assert own["videop2p"] == VideoP2P(sites="self & up", threshold=0.5, blend=("fox",))
    assert further == {"p2p": P2P()}
    own, further = sampling_methods(TRAINED, {})
    assert own["videop2p"] == VideoP2P(sites="self & up", threshold=0.5) and further == {}


def test_options_of_training_stay() -> None:
    with pytest.raises(ValueError, match=r"methods\.lora\.rank is what the adapter was trained wi"):
        sampling_methods(TRAINED, {"lora": {"rank": 4}})
    with pytest.raises(ValueError, match=r"methods\.videop2p\.sites is what .*alone: blend, "):
        sampling_methods(TRAINED, {"videop2p": {"sites": "self"}})
    with pytest.raises(RecipeError, match=r"methods\.p2pp: no such method"):
        sampling_methods(TRAINED, {"p2pp": {}})
    with pytest.raises(RecipeError, match=r"methods\.videop2p\.threshold=2"):
        sampling_methods(TRAINED, {"videop2p": {"threshold": 2}})
