"""Which members of a tar an index passes over."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from tars import pack

from trainer.data.tars.manifest import index


def test_an_empty_file_that_a_system_left_is_passed_over(tmp_path: Path) -> None:
    """Under any name; the same file in another place is refused."""
    png = BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    sample = [("0.png", png.getvalue()), ("0.txt", b"a thing")]
    (shard,) = index([pack(tmp_path / "a.tar", *sample, ("__MACOSX/0.pkl", b""))])
    assert [entry.key for entry in shard.samples] == ["0"]
    with pytest.raises(ValueError, match=r"member '1\.pkl': a pickle can run code"):
        index([pack(tmp_path / "b.tar", *sample, ("1.pkl", b""))])


@pytest.mark.parametrize(
    "left",
    [
        "@eaDir/0.png/SYNOFILE_THUMB_M.png", "#recycle/1.png", "$RECYCLE.BIN/1.png", "0.txt~",
        "0.png:Zone.Identifier", "System Volume Information/1.png", "lost+found/1.png",
        "ehthumbs.db",
    ],
)  # fmt: skip
def test_what_file_servers_windows_and_editors_leave_is_passed_over(
    left: str, tmp_path: Path
) -> None:
    png = BytesIO()
    Image.new("RGB", (32, 32)).save(png, "PNG")
    members = [("0.png", png.getvalue()), (left, png.getvalue()), ("0.txt", b"a thing")]
    (shard,) = index([pack(tmp_path / "a.tar", *members)])
    assert [(entry.key, sorted(entry.members)) for entry in shard.samples] == [
        ("0", ["png", "txt"])
    ]
    assert not shard.bad
