"""Downloading weights from a real server on loopback, and reading weights files."""

import argparse
import hashlib
import os
import pickle
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import safetensors.torch
import torch

from samray.errors import CheckpointError, ConfigError, DownloadError
from samray.sam import weights

CONTENT = bytes(range(256)) * 12_000  # 3 MB, so that a cut falls between chunks
FILE_NAME = "sam_vit_b_01ec64.pth"


class Server(ThreadingHTTPServer):
    """Serves CONTENT with Range support, and fails as its attributes say."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []  # the Range header of each request
        self.bytes_sent = 0
        self.body = CONTENT
        self.cut_after: list[int] = []  # bytes to send before cutting, one entry per request
        self.statuses: list[int] = []  # answers to give instead, one entry per request
        self.ignores_range = False
        self.hides_length = False
        self.delay = 0.0  # seconds

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/mirror"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.ranges.append(wanted)
        time.sleep(server.delay)
        if server.statuses and (status := server.statuses.pop(0)) != 200:
            return self.send_error(status)
        if self.path != f"/mirror/{FILE_NAME}":
            return self.send_error(404)
        start = 0
        if wanted and not server.ignores_range:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(server.body):
                return self.send_error(416)
            self.send_response(206)
            end, total = len(server.body) - 1, len(server.body)
            self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
        else:
            self.send_response(200)
        if not server.hides_length:
            self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        stop = start + server.cut_after.pop(0) if server.cut_after else len(server.body)
        for at in range(start, stop, 65536):
            piece = server.body[at : min(at + 65536, stop)]
            try:
                self.wfile.write(piece)
            except ConnectionError:  # the client closed the connection
                return None
            server.bytes_sent += len(piece)
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("SAMRAY_WEIGHTS_URL", server.url)
    monkeypatch.setenv("SAMRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "RETRY_SECONDS", (0.0, 0.0, 0.0))
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    small = weights.OfficialWeights(FILE_NAME, len(CONTENT), sha256)
    monkeypatch.setitem(weights.OFFICIAL_WEIGHTS, "vit_b", small)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the fetched file belongs; its folder exists."""
    folder = tmp_path / "cache" / "weights"
    folder.mkdir(parents=True)
    return folder / FILE_NAME


def part_of(path: Path) -> Path:
    return path.with_name(f"{FILE_NAME}.part")


def assert_whole(path: Path) -> None:
    assert path.read_bytes() == CONTENT
    assert not part_of(path).exists()


def test_table_is_metas() -> None:
    assert {k: v.size_bytes for k, v in weights.OFFICIAL_WEIGHTS.items()} == {
        "vit_b": 375042383,
        "vit_l": 1249524607,
        "vit_h": 2564550879,
    }
    for official in weights.OFFICIAL_WEIGHTS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", official.sha256)


def test_fetched_once(server: Server, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert weights.fetch_official("vit_b") == path
    assert_whole(path)
    said = capfd.readouterr().err
    assert FILE_NAME in said
    assert "3 MiB" in said
    assert server.url in said
    assert weights.fetch_official("vit_b") == path
    assert server.ranges == [None]
    assert capfd.readouterr().err == ""


def test_hashed_once(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(CONTENT)  # copied there by hand
    hashed = []
    sha256 = weights._sha256
    monkeypatch.setattr(weights, "_sha256", lambda path: hashed.append(path) or sha256(path))
    for _ in range(3):
        assert weights.fetch_official("vit_b") == path
    assert hashed == [path]
    assert server.ranges == []


def test_default_cache_is_in_home(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    home = Path(os.environ["SAMRAY_CACHE"]).parent
    monkeypatch.delenv("SAMRAY_CACHE")
    monkeypatch.setenv("HOME", str(home))
    assert weights.fetch_official("vit_b") == home / ".cache/samray/weights" / FILE_NAME


@pytest.mark.parametrize("damage", [CONTENT[:-1], b"\xff" + CONTENT[1:]])
def test_corrupt_cached_file_is_fetched_again(
    server: Server, path: Path, damage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    weights.fetch_official("vit_b")
    path.write_bytes(damage)
    os.utime(path, ns=(1, 1))  # a sidecar is there, but for another modification time
    assert weights.fetch_official("vit_b") == path
    assert_whole(path)
    assert "is not the published file" in capfd.readouterr().err
    assert len(server.ranges) == 2


def test_wrong_hash(server: Server, path: Path) -> None:
    server.body = b"\xff" + CONTENT[1:]
    with pytest.raises(DownloadError) as raised:
        weights.fetch_official("vit_b")
    message = str(raised.value)
    for word in (
        FILE_NAME,
        hashlib.sha256(CONTENT).hexdigest(),
        hashlib.sha256(server.body).hexdigest(),
        "proxy",
        "SAMRAY_WEIGHTS_URL",
        "--checkpoint FILE",
    ):
        assert word in message
    assert "\n" not in message
    assert not path.exists()
    assert not part_of(path).exists()


@pytest.mark.parametrize("hides_length", [False, True])
def test_cut_connection_is_resumed(server: Server, path: Path, hides_length: bool) -> None:
    server.cut_after, server.hides_length = [2_000_000], hides_length
    weights.fetch_official("vit_b")
    assert_whole(path)
    first, second = server.ranges
    assert first is None
    resumed_at = int(re.fullmatch(r"bytes=(\d+)-", second)[1])
    assert 2_000_000 - weights.CHUNK_BYTES <= resumed_at <= 2_000_000
    assert len(CONTENT) <= server.bytes_sent <= len(CONTENT) + weights.CHUNK_BYTES


def test_always_cut_gives_up_and_keeps_the_part(server: Server, path: Path) -> None:
    server.cut_after = [600_000] * 4
    with pytest.raises(DownloadError, match=r"expected .* 3072000 bytes, got .*try again"):
        weights.fetch_official("vit_b")
    assert len(server.ranges) == 4
    assert not path.exists()
    kept = part_of(path).read_bytes()
    assert len(kept) > 1_000_000
    assert CONTENT.startswith(kept)
    weights.fetch_official("vit_b")
    assert server.ranges[4] == f"bytes={len(kept)}-"
    assert_whole(path)


def test_server_that_ignores_range(server: Server, path: Path) -> None:
    server.cut_after, server.ignores_range = [2_000_000], True
    weights.fetch_official("vit_b")
    assert_whole(path)
    assert len(server.ranges) == 2


def test_part_left_by_an_earlier_process(server: Server, path: Path) -> None:
    part_of(path).write_bytes(CONTENT[:1_000_000])
    weights.fetch_official("vit_b")
    assert_whole(path)
    assert server.ranges == ["bytes=1000000-"]


def test_whole_part_needs_no_request(server: Server, path: Path) -> None:
    part_of(path).write_bytes(CONTENT)
    weights.fetch_official("vit_b")
    assert_whole(path)
    assert server.ranges == []


def test_part_that_is_too_long_starts_over(server: Server, path: Path) -> None:
    part_of(path).write_bytes(CONTENT + b"more")
    weights.fetch_official("vit_b")
    assert_whole(path)
    assert server.ranges == [None]


def test_range_not_satisfiable_starts_over(server: Server, path: Path) -> None:
    part_of(path).write_bytes(CONTENT[:1000])
    server.statuses = [416]
    weights.fetch_official("vit_b")
    assert_whole(path)
    assert server.ranges == ["bytes=1000-", None]


def test_server_errors_are_retried(server: Server, path: Path) -> None:
    server.statuses = [503, 500, 429]
    weights.fetch_official("vit_b")
    assert_whole(path)
    assert len(server.ranges) == 4


def test_not_found_is_not_retried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_WEIGHTS_URL", server.url + "/elsewhere/")
    with pytest.raises(DownloadError, match=r"elsewhere/sam_vit_b.*HTTP 404 .*--checkpoint FILE"):
        weights.fetch_official("vit_b")
    assert len(server.ranges) == 1


def test_no_network(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.shutdown()
    server.server_close()
    url = server.url.replace("//", "//user:secret@")
    monkeypatch.setenv("SAMRAY_WEIGHTS_URL", url)
    try:
        raise KeyError("something else")  # an unrelated error that a caller handles
    except KeyError:
        with pytest.raises(DownloadError) as raised:
            weights.fetch_official("vit_b")
    message = str(raised.value)
    for word in (
        f"{server.url}/{FILE_NAME}",
        "Connection refused",
        f"at {path},",
        "`--checkpoint FILE`",
        "`--checkpoint none`",
    ):
        assert word in message
    assert "\n" not in message
    assert "secret" not in message
    assert "something else" not in message


def test_unusable_url_is_not_retried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_WEIGHTS_URL", "mirror.example/sam")
    monkeypatch.setattr(weights, "RETRY_SECONDS", (60.0,))
    with pytest.raises(DownloadError, match="SAMRAY_WEIGHTS_URL"):
        weights.fetch_official("vit_b")


@pytest.mark.parametrize("body", [CONTENT + b"x" * 50_000_000, b"<html>log in first</html>"])
def test_content_length_of_another_file(server: Server, path: Path, body: bytes) -> None:
    server.body = body
    with pytest.raises(DownloadError, match=f"3072000 bytes, got a file of {len(body)} bytes"):
        weights.fetch_official("vit_b")
    assert len(server.ranges) == 1
    assert not path.exists()
    assert not part_of(path).exists()


def test_oversized_stream_is_cut_off(server: Server, path: Path) -> None:
    server.body, server.hides_length = CONTENT + b"x" * 50_000_000, True
    with pytest.raises(DownloadError, match="3072000 bytes, got a longer stream"):
        weights.fetch_official("vit_b")
    assert server.bytes_sent < 30_000_000  # only what the sockets had buffered
    assert not path.exists()
    assert not part_of(path).exists()


def test_two_at_once_download_once(server: Server, path: Path) -> None:
    server.delay = 0.7  # the second has to wait and prints a message
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(weights.fetch_official, ["vit_b"] * 2)) == [path] * 2
    assert_whole(path)
    assert server.ranges == [None]


def test_full_disk(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: usage)
    part_of(path).write_bytes(CONTENT[:500_000])
    with pytest.raises(DownloadError, match=r"expected 2572000 bytes free .*got 1000000"):
        weights.fetch_official("vit_b")
    assert server.ranges == []


def test_cache_that_is_no_folder(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMRAY_CACHE", __file__)
    with pytest.raises(DownloadError, match=r"test_weights.py/weights: .*set SAMRAY_CACHE"):
        weights.fetch_official("vit_b")


def test_timeouts_are_set(server: Server, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.delay = 1.0
    monkeypatch.setattr(weights, "TIMEOUT_SECONDS", (0.1, 0.1))
    with pytest.raises(DownloadError, match="timed out"):
        weights.fetch_official("vit_b")
    assert issubclass(DownloadError, OSError)
    assert issubclass(requests.RequestException, OSError)  # hence the order of the handlers


def test_model_without_published_weights() -> None:
    with pytest.raises(ConfigError, match=r"'tiny'.*vit_b, vit_l, vit_h.*--checkpoint none"):
        weights.fetch_official("tiny")


def fake_sam(width: int = 768) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "image_encoder.patch_embed.proj.weight": torch.randn(width, 1, 2, 2),
        "image_encoder.pos_embed": torch.randn(1, 4, 4, 8),
        "prompt_encoder.no_mask_embed.weight": torch.randn(1, 8),
        "mask_decoder.iou_token.weight": torch.randn(1, 8).bfloat16(),
        "mask_decoder.scale": torch.tensor(3.0),
    }


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in fake_sam().items()}


FORMS = {
    "plain": fake_sam(),
    "module.": prefixed("module."),
    "sam.": prefixed("sam."),
    "module.sam.": prefixed("module.sam."),
    "MedSAM": {"model": fake_sam(), "optimizer": {"state": {}, "lr": 0.1}, "epoch": 3},
    "micro-sam": {"model_state": prefixed("sam."), "iteration": 5, "train_time": 1.5},
    "Lightning": {"state_dict": fake_sam(), "hyper_parameters": {}},
    "model_state_dict": {"epoch": 1, "model_state_dict": prefixed("module.")},
    "parameters": {k: torch.nn.Parameter(v) for k, v in fake_sam().items()},
    "more": {**fake_sam(), "epoch": 3, "note": "text"},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_loads_every_known_form(tmp_path: Path, form: str, zipped: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save(FORMS[form], path, _use_new_zipfile_serialization=zipped)
    loaded = weights.load_state_dict(path)
    assert weights.digest_of(loaded) == weights.digest_of(fake_sam())
    assert not any(value.requires_grad for value in loaded.values())
    assert weights.model_type_of(loaded) == "vit_b"


def test_other_tensors_stay(tmp_path: Path) -> None:
    torch.save(prefixed("sam.") | {"decoder.weight": torch.ones(2)}, tmp_path / "weights.pt")
    assert set(weights.load_state_dict(tmp_path / "weights.pt")) == {*fake_sam(), "decoder.weight"}


def test_loads_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(prefixed("module."), path)
    assert weights.digest_of(weights.load_state_dict(path)) == weights.digest_of(fake_sam())


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        weights.load_state_dict(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: expected a SAM weights file, got ")
    assert "\n" not in message
    return message


class Malicious:
    """Creates a folder when it is unpickled by an ordinary loader."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["zip", "legacy", 0, 2, 4, 5])
@pytest.mark.parametrize("forced", [False, True])
def test_malicious_pickle_does_not_run(
    tmp_path: Path, way: str | int, forced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced:  # users set it to make torch.load run pickles
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, trap = tmp_path / "evil.pth", tmp_path / "trap"
    content = {"model": fake_sam(), "args": Malicious(trap)}
    if isinstance(way, int):
        path.write_bytes(pickle.dumps(content, protocol=way))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    message = refusal(path)
    assert not trap.exists()
    if way != 0:  # a pickle of protocol 0 looks like a text file and is not read
        assert "holds more than tensors" in message
        assert "was NOT run" in message
    if way in ("zip", "legacy"):
        assert "posix.mkdir" in message or "nt.mkdir" in message
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # unpickled by an ordinary loader, it works


def test_training_checkpoint_with_objects(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save({"model_state": fake_sam(), "init": argparse.Namespace(lr=1)}, path)
    message = refusal(path)
    assert "argparse.Namespace" in message
    assert "export it to a plain state dict" in message


@pytest.mark.parametrize("keep", [1, 10, 300, 2000, -100])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated(tmp_path: Path, kind: str, keep: int) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(fake_sam(), path)
    else:
        torch.save(fake_sam(), path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[:keep])
    assert f"got {path.stat().st_size} bytes that " in refusal(path)


def test_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(fake_sam(), path)
    content = path.read_bytes()
    at = content.index(b"image_encoder")
    path.write_bytes(content[: at - 5] + b"\xff" * 20 + content[at + 15 :])
    refusal(path)


def test_file_that_is_no_weights_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.pth")
    assert "a folder" in refusal(tmp_path)
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).touch()
        assert "an empty file" in refusal(tmp_path / name)
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><title>Sign in</title>")
    assert "37 bytes that begin with b'<!DOCTYPE html><'" in refusal(tmp_path / "page.pth")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><title>Sign in</title>")
    assert "37 bytes" in refusal(tmp_path / "page.safetensors")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({}, "no tensors but nothing"),
        ({"epoch": 1, "model": {"lr": 1}}, "no tensors but lr"),
        ([torch.ones(1)], "no tensors but a list"),
        (torch.ones(1), "no tensors but a Tensor"),
        ({"conv1.weight": torch.ones(1), 7: torch.ones(1)}, "2 tensors of another model (conv1"),
    ],
)
def test_file_of_something_else(tmp_path: Path, content: object, got: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    assert got in refusal(tmp_path / "other.pth")


ONE = torch.ones(1)
# Names from the published files.
FOREIGN = {
    "Hugging Face's SamModel": {
        "shared_image_embedding.positional_embedding": ONE,
        "vision_encoder.pos_embed": ONE,
        "prompt_encoder.no_mask_embed.weight": ONE,
        "mask_decoder.iou_token.weight": ONE,
    },
    "SAM 2": {
        "model": {
            "maskmem_tpos_enc": ONE,
            "image_encoder.trunk.pos_embed": ONE,
            "memory_attention.layers.0.self_attn.q_proj.weight": ONE,
            "sam_mask_decoder.iou_token.weight": ONE,
        }
    },
    "MobileSAM": {
        "image_encoder.patch_embed.seq.0.c.weight": ONE,
        "image_encoder.layers.0.blocks.0.conv1.c.weight": ONE,
        "prompt_encoder.no_mask_embed.weight": ONE,
        "mask_decoder.iou_token.weight": ONE,
    },
    "HQ-SAM": fake_sam() | {"mask_decoder.hf_token.weight": ONE},
    "a mask decoder alone": {"module.mask_decoder.iou_token.weight": ONE},
    "a mask decoder alone, ": {"iou_token.weight": ONE, "transformer.layers.0.norm1.bias": ONE},
    "an image encoder alone": {"image_encoder.pos_embed": ONE},
}


@pytest.mark.parametrize("whose", FOREIGN)
@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_weights_of_another_model_say_whose_they_are_and_what_to_do(
    tmp_path: Path, whose: str, form: str
) -> None:
    path, content = tmp_path / f"other.{form}", FOREIGN[whose]
    if form == "pth":
        torch.save(content, path)
    else:
        tensors = {name: value.clone() for name, value in content.get("model", content).items()}
        safetensors.torch.save_file(tensors, path)
    message = refusal(path)
    assert whose in message
    assert "--checkpoint" in message or "merge them into" in message


@pytest.mark.parametrize(("width", "name"), [(768, "vit_b"), (1024, "vit_l"), (1280, "vit_h")])
def test_model_type(width: int, name: str) -> None:
    assert weights.model_type_of(fake_sam(width)) == name


def test_model_type_of_something_else() -> None:
    encoder_only = {k: v for k, v in fake_sam().items() if k.startswith("image_encoder.")}
    no_encoder = {k: v for k, v in fake_sam().items() if not k.startswith("image_encoder.")}
    for state_dict in (fake_sam(192), encoder_only, no_encoder, {}):
        assert weights.model_type_of(state_dict) is None


def test_digest() -> None:
    sam = fake_sam()
    digest = weights.digest_of(sam)
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert weights.digest_of(dict(reversed(sam.items()))) == digest
    name = "image_encoder.pos_embed"
    strided = sam[name].transpose(1, 2).contiguous().transpose(1, 2)
    assert weights.digest_of({**sam, name: strided}) == digest
    changed = sam[name].clone()
    changed[0, 3, 3, 7] += 1e-6
    for other in (changed, sam[name].reshape(16, 8), sam[name].view(torch.int32)):
        assert weights.digest_of({**sam, name: other}) != digest
    renamed = {("x" if k == name else k): v for k, v in sam.items()}
    assert weights.digest_of(renamed) != digest


def test_digest_of_a_part() -> None:
    sam = fake_sam()
    changed = {**sam, "mask_decoder.scale": torch.tensor(4.0)}
    assert weights.digest_of(sam, "image_encoder.") == weights.digest_of(changed, "image_encoder.")
    assert weights.digest_of(sam, "mask_decoder.") != weights.digest_of(changed, "mask_decoder.")
    assert weights.digest_of({"empty": torch.empty(0), "flag": torch.tensor(True)})
    with pytest.raises(CheckpointError, match="image_decoder"):
        weights.digest_of(sam, "image_decoder.")
