"""Which names are no files of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.common.left_by_systems import left_by_system, own_files

LEFT = """
._0.jpg|.DS_Store|.AppleDouble/0.jpg|a/.Trashes/0.jpg|__MACOSX/._0.jpg|Icon\r|Temporary Items/0.jpg
Thumbs.db|thumbs.DB|ehthumbs.db|Thumbs.db:encryptable|Desktop.ini|$RECYCLE.BIN/S-1-5/0.jpg
System Volume Information/0.txt|0.jpg:Zone.Identifier|@eaDir/0.jpg/SYNOFILE_THUMB_M.jpg
0.jpg@SynoEAStream|#recycle/0.jpg|@Recycle/0.jpg|lost+found/0.jpg|PaxHeaders.7/0.jpg|PaxHeader/0.jpg
0.txt~|~$notes.docx|.0.txt.swp|.directory|.nfs0000000
"""
OWN = (
    "0.jpg", "./0.jpg", "../0.jpg", "a.b/0.jpg", "thumbs/0.jpg", "recycle/0.jpg", "my icon.png",
    "~me/0.jpg", "a@b.jpg", "lost/0.jpg", "zone.identifier.txt", "thumbs.db.jpg", "~",
)  # fmt: skip


@pytest.mark.parametrize("name", LEFT.strip("\n").replace("\n", "|").split("|"))
def test_names_that_systems_give(name: str) -> None:
    assert left_by_system(name)


@pytest.mark.parametrize("name", OWN)
def test_names_that_people_give(name: str) -> None:
    assert not left_by_system(name)


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "._a.tar", "a.txt", "a.bin"):
        (tmp_path / name).touch()
    assert [path.name for path in own_files(tmp_path, ".tar", ".bin")] == [
        "a.bin",
        "a.tar",
        "b.tar",
    ]
    assert own_files(tmp_path / "nowhere", ".tar") == []
