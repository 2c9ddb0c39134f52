"""SAM weights: downloading the published files and reading weights files.

`fetch_official` downloads one of Meta's three published files into a cache, once and verified;
`load_state_dict` reads any SAM weights file without running code from it.
"""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from samray.errors import CheckpointError, ConfigError, DownloadError, without_secrets
from samray.storage import Place, cache_folder, local_copy


@dataclass(frozen=True)
class OfficialWeights:
    """One published file: name, size in bytes, and sha256 of the content in hex."""

    file_name: str
    size_bytes: int
    sha256: str


# Meta publishes no digests. These are from `micro_sam/util.py` of
# computational-cell-analytics/micro-sam and agree with other independent projects.
OFFICIAL_WEIGHTS: dict[str, OfficialWeights] = {
    "vit_b": OfficialWeights(
        "sam_vit_b_01ec64.pth",
        375_042_383,
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "vit_l": OfficialWeights(
        "sam_vit_l_0b3195.pth",
        1_249_524_607,
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "vit_h": OfficialWeights(
        "sam_vit_h_4b8939.pth",
        2_564_550_879,
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}
OFFICIAL_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
TIMEOUT_SECONDS = (10, 60)  # to connect; between two chunks of the stream
RETRY_SECONDS = (1.0, 2.0, 4.0)  # pauses between attempts, so there are four attempts
CHUNK_BYTES = 256 * 1024
WIDTH_TO_TYPE = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}  # channels of the patch embedding
CONTAINERS = ("model", "model_state", "state_dict", "model_state_dict")
SAM_KEY = re.compile(r"((?:module\.|sam\.)*)(?:image_encoder|prompt_encoder|mask_decoder)\.")


def fetch_official(model_type: str) -> Path:
    """Return Meta's weights for `model_type`, downloaded once into the cache and verified.

    The cache is ``$SAMRAY_CACHE/weights``, else ``~/.cache/samray/weights``; the source is
    `OFFICIAL_URL` or the mirror in ``SAMRAY_WEIGHTS_URL``. Several processes may call this at
    once: one downloads, the others wait.

    Args:
        model_type: ``vit_b``, ``vit_l`` or ``vit_h``.

    Returns:
        The file, whose sha256 is the published one.

    Raises:
        ConfigError: there are no published weights for `model_type`.
        DownloadError: no network, an unexpected file, no disk space, or no writable cache.
    """
    if model_type not in OFFICIAL_WEIGHTS:
        raise ConfigError(
            f"model type {model_type!r}: expected one with published weights "
            f"({', '.join(OFFICIAL_WEIGHTS)}); pass `--checkpoint FILE` or `--checkpoint none`"
        )
    official = OFFICIAL_WEIGHTS[model_type]
    path = cache_folder() / "weights" / official.file_name
    try:
        if _is_verified(path, official):  # before locking, as the cache may be read-only
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        try:
            held = lock.acquire(timeout=0.5)
        except Timeout:
            _say(f"waiting for another process that is fetching {path.name}")
            held = lock.acquire()
        with held:
            if not _is_verified(path, official):  # another process may have downloaded it
                _fetch_into(path, official)
        return path
    except DownloadError:
        raise
    except (OSError, NotImplementedError) as error:  # the latter: file system without locks
        raise DownloadError(
            f"{path.parent}: expected a folder to keep {official.file_name} in, got {error}; "
            "free space or correct its permissions, or set SAMRAY_CACHE to another folder"
        ) from error


def _is_verified(path: Path, official: OfficialWeights) -> bool:
    """Return whether `path` has the published content; hashed only after a change."""
    if not path.is_file() or path.stat().st_size != official.size_bytes:
        return False
    marker = _marker(path)
    if marker.is_file() and marker.read_bytes() == _stamp(path, official):
        return True
    if _sha256(path) != official.sha256:
        return False
    with contextlib.suppress(OSError):  # a read-only cache is hashed at each start instead
        marker.write_bytes(_stamp(path, official))
    return True


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256-ok")


def _stamp(path: Path, official: OfficialWeights) -> bytes:
    return f"{path.stat().st_size} {path.stat().st_mtime_ns} {official.sha256}\n".encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_into(path: Path, official: OfficialWeights) -> None:
    """Download to ``<path>.part``, verify it, then rename it to `path`."""
    if path.exists():
        _say(f"{path} is not the published file (its size or sha256 differs): fetching it again")
        path.unlink()
    part = path.with_name(f"{path.name}.part")
    url = (os.environ.get("SAMRAY_WEIGHTS_URL") or OFFICIAL_URL).rstrip("/") + f"/{path.name}"
    missing, free = official.size_bytes - _size(part), shutil.disk_usage(path.parent).free
    if free < missing:
        raise DownloadError(
            f"{path.parent}: expected {missing} bytes free for {path.name}, got {free}; "
            "free space or set SAMRAY_CACHE to another folder"
        )
    _say(
        f"fetching {path.name} ({official.size_bytes / 2**20:.0f} MiB, {missing / 2**20:.0f} MiB "
        f"to go) from {without_secrets(url)} into {path.parent}"
    )
    _download(url, part, official)
    if (received := _sha256(part)) != official.sha256:
        part.unlink()
        raise _failure(url, part, f"sha256 {official.sha256}", f"sha256 {received}")
    with part.open("rb+") as file:
        os.fsync(file.fileno())  # else a power failure could leave the name without the content
    os.replace(part, path)
    _marker(path).write_bytes(_stamp(path, official))


def _download(url: str, part: Path, official: OfficialWeights) -> None:
    """Fill `part` up to the published size, resuming after each cut connection."""
    for pause in (*RETRY_SECONDS, None):
        try:
            _receive_rest(url, part, official)
            return
        except (_InterruptedError, requests.RequestException) as error:
            reason = _innermost(error)
            if pause is None or isinstance(error, ValueError):  # requests' errors for invalid URLs
                break
        _say(f"{reason}; trying again in {pause:.0f} s")
        time.sleep(pause)
    raise _failure(url, part, f"{official.size_bytes} bytes", reason)


class _InterruptedError(Exception):
    """A failure of the server or connection that may not happen again."""


def _receive_rest(url: str, part: Path, official: OfficialWeights) -> None:
    """Append the missing bytes to `part`, never beyond the published size."""
    size, expected = official.size_bytes, f"{official.size_bytes} bytes"
    here = _size(part) if _size(part) <= size else 0
    if here == size:
        return
    headers = {"Accept-Encoding": "identity"}  # sizes and offsets refer to the plain file
    if here:
        headers["Range"] = f"bytes={here}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        here = _offset_of(response, here, part)
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and here + int(length) != size:
            raise _failure(url, part, expected, f"a file of {here + int(length)} bytes")
        bar = tqdm(
            desc=part.stem, total=size, initial=here, unit="B", unit_scale=True, disable=None
        )
        with bar, part.open("ab" if here else "wb") as file:
            for chunk in response.iter_content(CHUNK_BYTES):
                here += len(chunk)
                if here > size:
                    part.unlink()
                    raise _failure(url, part, expected, "a longer stream")
                file.write(chunk)
                bar.update(len(chunk))
    if here < size:
        raise _InterruptedError(f"a connection that ended after {here} bytes")


def _offset_of(response: requests.Response, here: int, part: Path) -> int:
    """Return the offset of the response body in the file, or raise if it is not part of it."""
    status, shown = response.status_code, f"HTTP {response.status_code} {response.reason}"
    if status == 200:
        return 0  # also the answer of a server that ignores Range
    if status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {here}-"):
        return here
    if status in (206, 416):  # `part` cannot be resumed, so the next attempt starts over
        part.unlink(missing_ok=True)
        raise _InterruptedError(f"{shown} for a request of the bytes from {here}")
    if status >= 500 or status in (408, 429):  # 408 request timeout, 429 too many requests
        raise _InterruptedError(shown)
    raise _failure(response.url, part, "HTTP 200", shown)


def _failure(url: str, part: Path, expected: str, got: str) -> DownloadError:
    return DownloadError(
        f"{without_secrets(url)}: expected {part.stem} with {expected}, got {got}; try again; if "
        "it repeats, there is no network or a proxy replaces the file: set SAMRAY_WEIGHTS_URL to a "
        f"mirror, put a file fetched elsewhere at {part.with_suffix('')}, or pass "
        "`--checkpoint FILE`, or `--checkpoint none` for random weights"
    )


def _innermost(error: BaseException) -> str:
    """Return the message of the innermost error that requests and urllib3 wrapped."""
    inner: object = error
    while isinstance(inner, BaseException):
        error, inner = inner, getattr(inner, "reason", None) or next(iter(inner.args), None)
    return " ".join(str(error).split()) or type(error).__name__


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _say(text: str) -> None:
    print(f"samray: {text}", file=sys.stderr, flush=True)


def load_state_dict(path: Place | str) -> dict[str, torch.Tensor]:
    """Return the SAM tensors of a weights file, under segment-anything's names, on the CPU.

    Reads ``.safetensors`` and files of `torch.save`: plain state dicts (Meta, MedSAM, micro-sam's
    exports) and training checkpoints that hold one under a name in `CONTAINERS`. The prefixes
    ``module.`` (DistributedDataParallel) and ``sam.`` (micro-sam's trainer) are removed. Code in
    the file is never run.

    Args:
        path: the weights file. The tensors may be memory-mapped, so copy them into a model before
            anything writes to the file.

    Returns:
        Name -> tensor, without gradients; other values are omitted.

    Raises:
        CheckpointError: the file is missing, damaged, not SAM's, or cannot be read without running
            code.
    """
    path = Path(path) if isinstance(path, str) else path
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise _unusable(path, got, "name a .pth or .safetensors file")
    found = _state_dict_in(_read_safely(path, local_copy(path)))
    tensors = {k: v.detach() for k, v in found.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        got = f"no tensors but {', '.join(map(str, list(found)[:5])) or 'nothing'}"
        raise _unusable(path, got, f"give a state dict, plain or under {' or '.join(CONTAINERS)}")
    if foreign := _foreign({str(name) for name in tensors}):
        raise _unusable(path, *foreign)
    prefixes = {match[1] for name in tensors if (match := SAM_KEY.match(str(name)))}
    if not prefixes:
        got = f"{len(tensors)} tensors of another model ({', '.join(map(str, list(tensors)[:3]))})"
        raise _unusable(
            path, got, "give SAM's, named image_encoder.*, prompt_encoder.*, mask_decoder.*"
        )
    prefix = min(prefixes, key=len)
    return {str(name).removeprefix(prefix): value for name, value in tensors.items()}


# Parts of tensors' names -> whose they are, what to do. The first match counts.
FOREIGN = {
    r"(memory_attention|memory_encoder|sam_mask_decoder|image_encoder\.trunk)\.": (
        "weights of SAM 2",
        "samray fine-tunes the first SAM: leave --checkpoint out to get Meta's, or give a SAM, "
        "MedSAM or micro-sam ViT file",
    ),
    r"(vision_encoder\.|shared_image_embedding\.)": (
        "weights of Hugging Face's SamModel, whose tensors have other names and shapes",
        "leave --checkpoint out to get Meta's file of the same model, or give the original file "
        "(.pth) that was converted",
    ),
    r"image_encoder\.(layers\.|patch_embed\.seq\.)": (
        "weights of MobileSAM, which has another image encoder",
        "use --model-type tiny without --checkpoint, or give a SAM, MedSAM or micro-sam ViT file",
    ),
    r"mask_decoder\.(hf_|compress_vit_feat|embedding_(encoder|maskfeature))": (
        "weights of HQ-SAM, which has another mask decoder",
        "leave --checkpoint out to get Meta's, or give a SAM, MedSAM or micro-sam ViT file",
    ),
}
DECODER = re.compile(r"(?:[\w.]*\.)?(iou_token|output_upscaling|output_hypernetworks_mlps)\.")


def _foreign(names: set[str]) -> tuple[str, str] | None:
    """Whose weights these are and what to do, if they are known and not a whole SAM."""
    for pattern, answer in FOREIGN.items():
        if any(re.match(rf"(?:[\w.]*\.)?{pattern}", name) for name in names):
            return answer
    merge = "merge them into the state dict of the SAM that they belong to, and give that"
    has_encoder = any("image_encoder." in name for name in names)
    if not has_encoder and any(DECODER.match(name) for name in names):
        return "a mask decoder alone, without image_encoder.*", merge
    if has_encoder and not any("mask_decoder." in name for name in names):
        return "an image encoder alone, without mask_decoder.*", merge
    return None


def _unusable(path: Place, got: str, advice: str) -> CheckpointError:
    return CheckpointError(f"{path}: expected a SAM weights file, got {got}; {advice}")


def _read_safely(path: Place, local: Path) -> Any:
    """Load the file with loaders that cannot run code; translate their errors."""
    try:
        with local.open("rb") as file:
            head = file.read(16)
        if not head:
            raise _unusable(path, "an empty file", "copy or download it again")
        if path.suffix.lower() == ".safetensors":
            return safetensors.torch.load_file(local, device="cpu")
        is_zip = head.startswith(b"PK\x03\x04")  # torch >= 1.6; before it, pickles (0x80)
        if not is_zip and not head.startswith(b"\x80"):
            got = f"{_size(local)} bytes that begin with {head!r}"
            raise _unusable(path, got, "give one that torch.save wrote, or a .safetensors")
        # Memory-mapped, as 2.5 GB may not fit twice. Never weights_only=False: it runs code.
        return torch.load(local, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise _unusable(
            path,
            f"one that holds more than tensors{f' ({refused[1]})' if refused else ''} and was NOT "
            "run, as it could do anything",
            "export it to a plain state dict if you trust it "
            "(micro-sam: micro_sam.util.export_custom_sam_model) and give that",
        ) from error
    except Exception as error:  # damaged files make the parsers raise any kind of error
        reason = _innermost(error).partition(". ")[0]
        got = f"{_size(local)} bytes that are truncated, damaged or unreadable ({reason})"
        raise _unusable(path, got, "copy or download it again") from error


def _state_dict_in(loaded: Any) -> Mapping[Any, Any]:
    """Return the state dict, extracted from a training checkpoint if it is one."""
    if not isinstance(loaded, dict):
        return {f"a {type(loaded).__name__}": None}
    if not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = [loaded[name] for name in CONTAINERS if isinstance(loaded.get(name), dict)]
        loaded = inner[0] if inner else loaded
    return dict(loaded)


def model_type_of(state_dict: Mapping[str, torch.Tensor]) -> str | None:
    """Return which of Meta's three models the tensors of `load_state_dict` belong to.

    Returns:
        ``vit_b``, ``vit_l`` or ``vit_h``, by the width of the patch embedding; None for any other
        image encoder, or without the rest of SAM.
    """
    weight = state_dict.get("image_encoder.patch_embed.proj.weight")
    has_sam = any(name.startswith(("prompt_encoder.", "mask_decoder.")) for name in state_dict)
    if weight is None or weight.ndim != 4 or not has_sam:
        return None
    return WIDTH_TO_TYPE.get(weight.shape[0])


def digest_of(state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> str:
    """Return a digest of the tensors whose name starts with `prefix`, e.g. ``image_encoder.``.

    Returns:
        sha256 in hex over names, dtypes, shapes and bytes; independent of order and device.

    Raises:
        CheckpointError: no name starts with `prefix`; such digests would all be equal.
    """
    names = sorted(name for name in state_dict if name.startswith(prefix))
    if not names:
        raise CheckpointError(
            f"digest: expected tensors named {prefix}*, got none in {len(state_dict)}; "
            "check the prefix"
        )
    digest = hashlib.sha256()
    for name in names:
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        # As bytes, as numpy has no bfloat16; flat, as a scalar has no axis to view.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
