"""What a stranger may hand over, each row of docs/security.md: refused with what to do, or
harmless."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tars import pack

from trainer.__main__ import main
from trainer.common import secrets
from trainer.common.exit_codes import BAD_RECIPE, DAMAGED
from trainer.common.paths import slug
from trainer.config.header import HEADER, read_header
from trainer.config.run_section import RunSpec
from trainer.config.schema import RecipeError
from trainer.config.value_errors import build_section
from trainer.data.source import Needs
from trainer.data.sources.shards import Shards
from trainer.data.tars.manifest import MAX_MEMBER
from trainer.media.images import ImageError
from trainer.media.read_video import examine
from trainer.runs.adapter import load_adapted
from trainer.training import checkpoint_files as checkpoint
from trainer.training.checkpoint_files import every_checkpoint

CANARY = "canary-5f1e2d"
TOKEN = "hf_" + "Canary7" * 5
HTML = "<img src=x onerror=alert(1)> \"'/../../{[/red]}\\ $(id) `id`"
SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_PASSWORD", "MY_DATABASE")


class Opens:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (str(self.place), "w"))


@pytest.fixture
def opened(tmp_path: Path) -> Path:
    """Where code from outside would leave its mark."""
    return tmp_path / "opened"


@pytest.fixture
def payload(opened: Path) -> bytes:
    """As plain pickle; torch's zip form holds the same."""
    return pickle.dumps(Opens(opened))


@pytest.fixture(autouse=True)
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", os.devnull)


def refused(words: list[str], printed: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 78
    out, err = printed.readouterr()
    assert "Traceback" not in err and CANARY not in out + err
    return err


def png(size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def needs(path: Path) -> Needs:
    return Needs(32, 4, lambda prompts, seed, guidance: (), path / "cache", lambda: "tiny")


# pickles


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.pickle", "a.pth", "a.pt", "a.png", "a.json"])
def test_pickle_in_a_shard(name: str, payload: bytes, opened: Path, tmp_path: Path) -> None:
    """webdataset's own decoders run the first five; the last two only call themselves so."""
    place = pack(tmp_path / "a.tar", (name, payload), ("a.txt", b"a thing"))
    with pytest.raises(ValueError, match=r"pickle can run code|not a readable image|0 images"):
        Shards(shards=place).open(needs(tmp_path))
    assert not opened.exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.safetensors", ["sample", "adapter={}", "prompt=a cat"]),
        ("a.safetensors", ["export", "adapter={}", "out=out"]),
        ("a.safetensors", ["merge", "adapter=[{},{}]", "out=out.safetensors"]),
        ("a.safetensors", ["import", "file={}", "backbone=tiny", "out=out.safetensors"]),
        ("a.pt", ["import", "file={}", "backbone=tiny", "out=out.safetensors"]),
        ("a.ckpt", ["import", "file={}", "backbone=tiny", "out=out.safetensors"]),
        ("a.bin", ["import", "file={}", "backbone=tiny", "out=out.safetensors"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_pickle_for_an_adapter(
    name: str,
    words: list[str],
    zipped: bool,
    opened: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"weight": Opens(opened)}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(Opens(opened)))
    said = refused([word.replace("{}", name) for word in words], capsys)
    assert "pickle" in said or "not a safetensors file" in said
    assert not opened.exists()


def test_pickle_for_the_weights_of_a_backbone(
    tiny_folder: Path, opened: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_folder, folder)
    (weights,) = (folder / "unet").glob("*.safetensors")
    weights.unlink()
    torch.save({"weight": Opens(opened)}, folder / "unet" / "diffusion_pytorch_model.bin")
    said = refused(["sample", f"backbone={folder}", "prompt=a cat"], capsys)
    assert "pickles are never loaded); save the pipeline with safe_serialization=True" in said
    assert not opened.exists()


# addresses and commands


@pytest.mark.parametrize(
    "value", ["pipe:touch opened", "pipe:touch opened #.tar", "file:a", "s3:a"]
)
@pytest.mark.parametrize(
    "words",
    [
        ["fit", "recipe={}"],
        ["fit", "recipe=custom_diffusion", "backbone={}"],
        ["fit", "recipe=custom_diffusion", "data.concept={}"],
        ["fit", "recipe=custom_diffusion", "data.prior_folder={}"],
        ["fit", "recipe=shards.yaml", "data.shards={}"],
        ["fit", "recipe=folder.yaml", "data.folder={}"],
        ["fit", "recipe=video.yaml", "data.video={}"],
        ["fit", "recipe=remote.yaml", "data.url={}"],
        ["fit", "recipe=stream.yaml", "data.urls={}"],
        ["data", "build", "shards={}"],
        ["data", "verify", "shards={}"],
        ["data", "verify", "folder={}"],
        ["sample", "adapter={}", "prompt=a"],
        ["sample", "backbone={}", "prompt=a"],
        ["import", "file={}", "backbone=tiny", "out=o.safetensors"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_commands_and_other_schemes(
    words: list[str],
    value: str,
    opened: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("shards", "folder", "video", "remote", "stream"):
        text = f"data: {{source: {source}}}\nmethods: {{selective: {{sites: cross}}}}\n"
        (tmp_path / f"{source}.yaml").write_text(text)
    before = sorted(tmp_path.iterdir())
    refused([word.replace("{}", value) for word in words], capsys)
    assert sorted(tmp_path.iterdir()) == before
    assert not opened.exists()


def test_a_file_that_is_named_like_a_protocol_of_ffmpeg(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`concat:real.mp4` would be another file than its bytes were checked of."""
    av = pytest.importorskip("av")
    monkeypatch.chdir(tmp_path)
    with av.open("real.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 40 * i, np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert examine(Path("real.mp4"), "real.mp4").frames == 4
    Path("concat:real.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(64))
    with pytest.raises(ImageError, match=r"truncated or damaged|no video"):
        examine(Path("concat:real.mp4"), "it")


# tars


def header(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", **pax: str) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, target, dict(pax)
    return info


@pytest.mark.parametrize(
    ("member", "says"),
    [
        (header("b.png", tarfile.SYMTYPE, "/etc/passwd"), "a link or a special file"),
        (header("b.png", tarfile.LNKTYPE, "../../etc/passwd"), "a link or a special file"),
        (header("b.png", tarfile.CHRTYPE), "a link or a special file"),
        (("../../b.png", b"x"), "an absolute or upward name"),
        (("/etc/b.png", b"x"), "an absolute or upward name"),
        (("..\\b.png", b"x"), "an absolute or upward name"),
        (("b\x1b]0;title\x07.png", b"x"), "control characters"),
        (header("b.png", size=str(10 * 2**30)), "10,737,418,240 bytes, the limit is"),
        (header("b.png", path="../b.png"), "an absolute or upward name"),
        (header("b.png", **{"GNU.sparse.size": str(2**40)}), "a link or a special file|bytes, the"),
    ],
    ids=[
        "symlink",
        "hard link",
        "device",
        "up",
        "absolute",
        "backslash",
        "control",
        "size",
        "renamed",
        "sparse",
    ],
)
def test_members_of_a_tar(member: Any, says: str, tmp_path: Path) -> None:
    inside = tmp_path / "in" / "deep"
    inside.mkdir(parents=True)
    place = pack(inside / "a.tar", ("a.png", png()), ("a.txt", b"a"), member, pax=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=says) as caught:
        Shards(shards=place, on_bad="skip").open(needs(tmp_path))
    assert "a.tar" in str(caught.value) and "\x1b" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_never_unpacked(kind: str, tmp_path: Path) -> None:
    """1 GB of zeros in a member, and less than 2 MB on the disk."""
    info = tarfile.TarInfo("a.png")
    info.size = 2**26 + 1
    with tarfile.open(tmp_path / "a.tar", f"w:{kind}") as archive:  # type: ignore[call-overload]
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(ValueError, match=r"compressed .*copy it again as a plain \.tar"):
        Shards(shards=tmp_path / "a.tar").open(needs(tmp_path))


def test_json_that_nests_without_end(tmp_path: Path) -> None:
    deep = b'{"caption": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    place = pack(tmp_path / "a.tar", ("a.png", png()), ("a.json", deep))
    with pytest.raises(ImageError, match=r"a\.json: not readable as JSON"):
        Shards(shards=place).open(needs(tmp_path))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace('"a.tar"', '"../../etc/a.tar"'),
        lambda text: text.replace('"png":[', '"png":[-'),
        lambda text: text.replace('"width":32', '"width":0'),
        lambda text: text.replace('"samples"', '"_target_":"os.system","samples"'),
        lambda text: text.replace('"txt":', '"pkl":'),
        lambda text: "[" * 100_000,
    ],
    ids=["name", "offset", "width", "target", "pickle", "nested"],
)
def test_a_manifest_that_was_made_to_hurt(spoil: Callable[[str], str], tmp_path: Path) -> None:
    place = tmp_path / "in"
    place.mkdir()
    pack(place / "a.tar", ("a.png", png()), ("a.txt", b"a"))
    source = Shards(shards=place)
    source.open(needs(tmp_path))
    manifest = place / "manifest.json"
    text = manifest.read_text()
    assert spoil(text) != text
    manifest.write_text(spoil(text))
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        source.open(needs(tmp_path))


def test_a_manifest_cannot_make_a_read_larger_than_a_member(tmp_path: Path) -> None:
    place = pack(tmp_path / "a.tar", ("a.png", png()), ("a.txt", b"a"))
    train, _ = Shards(shards=place).open(needs(tmp_path))
    asked: list[int] = []
    part = train.rows[0][1].members["png"]  # type: ignore[attr-defined]
    train.rows[0][1].members["png"] = part._replace(size=2**50)  # type: ignore[attr-defined]
    read = train.read  # type: ignore[attr-defined]

    def asks(*place: Any, offset: int, size: int) -> bytes:
        asked.append(size)
        return bytes(read(*place, offset=offset, size=size))

    train.read = asks  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"the bytes of a\.png have changed"):
        train.image(0)
    assert asked == [MAX_MEMBER]


# recipes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("run: {out: '${oc.env:HF_TOKEN}'}", "run.out: interpolation"),
        ("run: {out: '${oc.decode:${oc.env:HF_TOKEN}}'}", "run.out: interpolation"),
        ("data: {source: world, x: '${oc.env:HF_TOKEN}'}", "data.x: interpolation"),
        ("backbones: {tiny: {preview: {prompts: ['${oc.env:HF_TOKEN}']}}}", "interpolation"),
        ("methods: {lora: {_target_: os.system}}", "methods.lora._target_: recipes name files"),
        ("data: {source: world}\nmethods: {os.system: {}}", "methods.os.system: no such method"),
        ("data: {source: world}\nmethods: {../../evil: {}}", "methods.../../evil: no such method"),
        ("data: {source: ../../evil}", "data.source=../../evil: no such source"),
        ("data: {source: os}", "data.source=os: no such source"),
        ("base: /etc/passwd", "no such recipe"),
        ("run: {out: !!python/object/apply:os.system ['touch opened']}", "not readable as YAML"),
        ("run: {out: !!python/name:os.system }", "not readable as YAML"),
    ],
    ids=str,
)
def test_recipe_of_a_stranger(
    text: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    said = refused(["check", f"recipe={tmp_path / 'mine.yaml'}"], capsys)
    assert says in said
    assert not opened.exists()


def test_recipe_whose_aliases_would_fill_the_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    said = refused(["check", f"recipe={tmp_path / 'mine.yaml'}"], capsys)
    assert "YAML aliases (*name) are not read; write the value out" in said


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".x", "", "a b", '"', "<b>", "a\n", "a\0", "é"]
)
def test_run_names_are_plain(name: str) -> None:
    with pytest.raises(RecipeError, match=r"run\.id"):
        build_section(RunSpec, {"id": name}, "run")


@pytest.mark.parametrize(
    "prompt", [HTML, "../../etc/passwd", "C:\\x", "\0", "." * 300, "/", "a" * 999]
)
def test_prompts_make_plain_file_names(prompt: str) -> None:
    name = slug(prompt)
    assert name and len(name) <= 60
    assert all(letter.isalnum() or letter == "-" for letter in name)


# secrets


@pytest.mark.parametrize(
    "token",
    [
        TOKEN,
        "ghp_" + "a" * 36,
        "github_pat_" + "a" * 30,
        "glpat-" + "a" * 20,
        "AKIA" + "A" * 16,
        "sk-" + "a" * 40,
        "xoxb-" + "1" * 12,
        "AIza" + "a" * 35,
        "wandb_v1_" + "a" * 30,
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
    ids=lambda token: token[:6],
)
def test_access_tokens_do_not_get_into_a_recipe(
    token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"preview": {"prompts": ["a", token]}}))
    for words in (
        [f"recipe={tmp_path / 'mine.yaml'}"],
        ["recipe=custom_diffusion", f"preview.negative={token}"],
        ["recipe=custom_diffusion", f"preview.prompts=[a, 'b {token}']"],
        ["recipe=custom_diffusion", f"tracker={token}"],
    ):
        said = refused(["check", *words], capsys)
        assert "an access token" in said and "keep the token in the environment" in said
        assert token not in said
    assert secrets.kind_of("a photo of a <v1> next to a sk-8 board") is None


@pytest.mark.parametrize("key", ["api_key", "run.password", "wandb.api_key", "data.secret"])
def test_no_key_takes_a_secret(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(["check", "recipe=custom_diffusion", f"{key}={CANARY}"], capsys)
    assert "no such key" in said


WORDS = (
    "recipe=custom_diffusion", "run.batch_size=2", "data.prior_weight=0", "data.class_word=null",
    "data.augment=false", "methods.new_token.init=animal", "run.steps=2", "run.checkpoint_every=1",
    "run.validate_every=0", "preview.every=1", "preview.steps=2", "preview.maps=null",
    "optim.ema=null",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with a prompt of hostile text, secrets around it and wandb offline; and what it
    printed."""
    pytest.importorskip("wandb")
    folder = tmp_path_factory.mktemp("wandb") / "run"
    prompts = f"preview.prompts=[{json.dumps(HTML)}]"
    words = [*WORDS, f"backbone={tiny_folder}", f"run={folder}", prompts, "tracker=wandb"]
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, f"{CANARY}-{name}")
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", os.devnull)
        printed = _printed(lambda: main(["fit", *words]))
    return folder, printed


def _printed(call: Callable[[], int]) -> str:
    """What a call, and the processes it starts, write to both streams."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        kept = [os.dup(1), os.dup(2)]
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            with redirect_stdout(file), redirect_stderr(file):
                assert call() == 0
        finally:
            file.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
        file.seek(0)
        return file.read()


def test_secrets_around_a_run_are_not_written(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert "adapter: " in printed
    assert CANARY not in printed
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_hostile_prompts_name_no_file_and_come_back_as_they_were(
    finished: tuple[Path, str],
) -> None:
    folder, _ = finished
    assert sorted(path.name for path in folder.parent.iterdir()) == ["run"]
    for path in folder.rglob("*"):
        assert path.name.isprintable() and not set(path.name) & set("<>\"'`$\\")
        if path.name != "report.html":  # the page of the run, in which prompts are text
            assert path.suffix not in (".html", ".htm", ".js", ".svg"), (
                "nothing a browser would run"
            )
    assert HTML not in (folder / "report.html").read_text(encoding="utf-8")
    tree = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    assert tree["preview"]["prompts"] == [HTML]
    stored, _ = read_header(folder / "adapter.safetensors")
    assert stored["preview"]["prompts"] == [HTML]


def rewritten(folder: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The run's adapter with another recipe in its header."""
    source = folder / "adapter.safetensors"
    with safe_open(source, "pt") as file:
        facts = json.loads(file.metadata()[HEADER])
    change(facts)
    save_file(load_file(source), to, {HEADER: json.dumps(facts)})
    return to


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda facts: facts["recipe"]["methods"].update(x={"_target_": "os.system"}), "methods.x"),
        (
            lambda facts: facts["recipe"]["methods"]["selective"].update(_target_="os.system"),
            "methods.selective._target_: no such key",
        ),
        (lambda facts: facts["recipe"].update(backbone="pipe:touch opened"), "neither a backbone"),
        (lambda facts: facts["recipe"].update(backbone="evil/from-a-hub"), "neither a backbone"),
        (lambda facts: facts["recipe"].update(backbone="${oc.env:HF_TOKEN}"), "neither a backbone"),
    ],
    ids=["method", "target", "pipe", "hub", "environment"],
)
def test_adapter_of_a_stranger(
    change: Callable[[dict[str, Any]], None],
    says: str,
    finished: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = rewritten(finished[0], tmp_path / "a.safetensors", change)
    assert says in refused(["sample", f"adapter={path}", "prompt=a cat"], capsys)


def test_text_of_an_adapter_reads_no_environment(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interpolations in places that nothing checks stay the text they are."""

    def change(facts: dict[str, Any]) -> None:
        facts["recipe"]["preview"] = {"steps": 1, "negative": "${oc.env:HF_TOKEN}"}
        facts["recipe"]["_target_"] = "os.system"

    path = rewritten(finished[0], tmp_path / "a.safetensors", change)
    _, tree = load_adapted(path)
    assert tree["preview"]["negative"] == "${oc.env:HF_TOKEN}"
    assert CANARY not in repr(tree)
    out = tmp_path / "out"
    words = ["sample", f"adapter={path}", f"prompt={HTML}", f"out={out}", "steps=1"]
    assert main(words) == 0
    assert CANARY not in "".join(capsys.readouterr())
    (written,) = out.rglob("*.png")
    assert written.parent == out


def resealed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The newest checkpoint changed by somebody who knows how to seal it."""
    place = every_checkpoint(folder / "checkpoints")[0]
    manifest = json.loads((place / checkpoint.MANIFEST).read_text())
    manifest.pop("sha256")
    change(manifest)
    manifest["files"] = {
        name: checkpoint._facts(place / name) for name in (checkpoint.WEIGHTS, checkpoint.STATE)
    }
    sealed = {**manifest, "sha256": checkpoint._seal(manifest)}
    (place / checkpoint.MANIFEST).write_text(json.dumps(sealed))


def test_checkpoint_of_a_stranger(
    finished: tuple[Path, str],
    tiny_folder: Path,
    tmp_path: Path,
    opened: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The recipe in its manifest is compared and never built; its pickle is refused."""
    run = tmp_path / "run"
    shutil.copytree(finished[0] / "checkpoints", run / "checkpoints")

    def change(manifest: dict[str, Any]) -> None:
        manifest["recipe"]["methods"] = {"os.system": {"_target_": "os.system"}}
        manifest["recipe"]["data"] = {"source": "${oc.env:HF_TOKEN}"}

    resealed(run, change)
    words = [*WORDS, f"backbone={tiny_folder}", "tracker=none", "preview.prompts=[]"]
    assert main(["fit", *words, f"run={run}"]) == BAD_RECIPE
    said = "".join(capfd.readouterr())
    assert "methods" in said and "data.source" in said
    assert CANARY not in said and not (run / "adapter.safetensors").exists()

    run = tmp_path / "pickled"
    shutil.copytree(finished[0] / "checkpoints", run / "checkpoints")
    place = every_checkpoint(run / "checkpoints")[0]
    torch.save({"parts": Opens(opened)}, place / checkpoint.STATE)
    resealed(run, lambda manifest: None)
    assert main(["fit", *words, f"run={run}"]) == DAMAGED
    assert "contains something else than tensors and plain values" in "".join(capfd.readouterr())
    assert not opened.exists()
    assert not (run / "adapter.safetensors").exists()
