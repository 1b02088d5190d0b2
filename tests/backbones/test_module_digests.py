"""Hashes of loaded parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from trainer.backbones import module_digests
from trainer.backbones.module_digests import settings


def test_settings_are_of_numbers_and_classes_and_not_of_places() -> None:
    def made(**changes: object) -> str:
        part = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        for name, value in changes.items():
            setattr(part[1], name, value)
        return settings(part)

    first = made()
    assert first == made() == made(path="/c", places=["/a", "/b"])
    assert len({first, made(eps=1e-3), made(scaling={"a": 2.0}), made(scaling={"a": 1.0})}) == 4
    assert made(gains=[1, 2]) != made(gains=[2, 1]) and made(on=True) != made(on=False)
    assert settings(nn.Sequential(nn.GELU())) != settings(nn.Sequential(nn.Tanh()))


def test_code_is_that_of_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_digests, "__file__", str(tmp_path / "module_digests.py"))
    (tmp_path / "a.py").write_text("1")
    first = module_digests.code.__wrapped__()
    assert first == module_digests.code.__wrapped__()
    (tmp_path / "a.py").write_text("2")
    assert first != module_digests.code.__wrapped__()
