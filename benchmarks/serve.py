"""The endpoint beside `SamPredictor` in process, and beside the two servers that people write.

    python benchmarks/serve.py click      [--model-type tiny|vit_b]   one warm click
    python benchmarks/serve.py throughput [--clients 32 --clicks 20]  requests a second
    python benchmarks/serve.py encodes                                how often an image is encoded

All with the same weights on the same machine, one torch thread a process. `naive` is FastAPI around
`SamPredictor`, the image in every request. `lru` keeps 100 embeddings behind a lock in one
process. With encode time E and decode time D, measured here, and c clicks an image, no server
that encodes once can beat the naive one by more than (E + D) / (E / c + D).
"""

import argparse
import asyncio
import base64
import io
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import requests
from PIL import Image

from samray.sample_data import write_sample_data


def main() -> None:
    """Run one part, or, as a child, one of the servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["click", "throughput", "encodes", "naive", "lru"])
    parser.add_argument("--model-type", default="tiny", choices=["tiny", "vit_b"])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--decoders", type=int, nargs="+", default=[1])
    parser.add_argument("--port", type=int, help="of a child")
    parser.add_argument("--weights", help="of a child, or a RUN; unset: tiny as it ships")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.what in ("naive", "lru"):
        other_server(arguments.what, arguments.weights, arguments.port)
        return
    with tempfile.TemporaryDirectory(prefix="samray-benchmark-") as folder:
        {"click": click, "throughput": throughput, "encodes": encodes}[arguments.what](
            Path(folder), arguments
        )


def click(root: Path, arguments: argparse.Namespace) -> None:
    """One warm click: HTTP against the call in process."""
    (raw,) = photos(root, 1)
    weights = weights_of(root, arguments)
    alone = in_process(weights, raw, 100)
    with Server(samray_command(weights), root) as url:
        image_id = requests.post(f"{url}/v1/images", data=raw, timeout=600).json()["image_id"]
        session, times, decodes = requests.Session(), [], []
        for number in range(220):
            body = {"image_id": image_id, "prompts": [point(number)], "mask_format": "rle"}
            started = time.perf_counter()
            answer = session.post(f"{url}/v1/predict", json=body, timeout=600).json()
            times.append(1000 * (time.perf_counter() - started))
            decodes.append(answer["timing_ms"]["decode"])
    times, decodes = times[20:], decodes[20:]
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    print(f"SamPredictor.predict in process: {alone['decode']:.1f} ms (median)")
    print(f"a warm click over HTTP: p50 {p50:.1f}, p95 {p95:.1f}, p99 {p99:.1f} ms")
    print(f"  of which decoding and the mask's form {statistics.median(decodes):.1f} ms")
    print(f"p50: {p50 / alone['decode']:.2f} times the call, {p50 - alone['decode']:.1f} ms above")


def throughput(root: Path, arguments: argparse.Namespace) -> None:
    """Requests a second of three servers under the same clients."""
    files = photos(root, arguments.clients)
    weights = weights_of(root, arguments)
    alone = in_process(weights, files[0], 30)
    e, d, c = alone["encode"], alone["decode"], arguments.clicks
    bound = (e + d) / (e / c + d)
    print(f"E {e:.1f} ms, D {d:.1f} ms, {c} clicks an image: bound {bound:.2f} times the naive one")
    rates = {}
    for kind in ("naive", "lru"):
        with Server(other_command(kind, weights), root) as url:
            rates[kind] = asyncio.run(load(url, files, c, kind))
            print(f"{kind}: {rates[kind]:.1f} requests/s")
    for decoders in arguments.decoders:
        with Server(samray_command(weights, decoders), root) as url:
            rate = asyncio.run(load(url, files, c, "samray"))
        print(
            f"samray, {decoders} decoders: {rate:.1f} requests/s; {rate / rates['naive']:.2f} "
            f"times naive, {rate / rates['naive'] / bound:.0%} of the bound, "
            f"{rate / rates['lru']:.2f} times lru"
        )


def encodes(root: Path, arguments: argparse.Namespace) -> None:
    """3 decoders, 20 images, 100 requests: how many found their embedding."""
    files = photos(root, 20)
    with Server(samray_command(None, 3), root) as url:
        rng = np.random.default_rng(0)
        found = 0
        for number in range(100):
            raw = files[int(rng.integers(20))] if number >= 20 else files[number]
            body = {"image": {"base64": base64.b64encode(raw).decode()}, "prompts": [point(1)]}
            answer = requests.post(f"{url}/v1/predict", json=body, timeout=60).json()
            found += answer["cache"] == "hit"
        print(f"20 images, 100 requests, 3 decoders: hit rate {found / 100:.2f} (0.80 is possible)")


async def load(url: str, files: list[bytes], clicks: int, kind: str) -> float:
    """Each client sends its image's clicks one after another; return requests a second."""

    async def client(session: aiohttp.ClientSession, raw: bytes) -> None:
        image = {"image": {"base64": base64.b64encode(raw).decode()}}
        for number in range(clicks):
            body = {**image, "prompts": [point(number)], "mask_format": "rle"}
            async with session.post(f"{url}/v1/predict", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
                if kind == "samray" or kind == "lru":  # it needs the image once
                    image = {"image_id": answer["image_id"]}

    timeout = aiohttp.ClientTimeout(total=1800)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        await client(session, files[0] + b"warm")
        started = time.perf_counter()
        await asyncio.gather(*(client(session, raw) for raw in files))
        return len(files) * clicks / (time.perf_counter() - started)


def point(number: int) -> dict[str, Any]:
    """A click, elsewhere each time."""
    return {"point_coords": [[60 + 7 * (number % 20), 90]], "point_labels": [1]}


def photos(root: Path, number: int) -> list[bytes]:
    """Drawn photos as JPEG."""
    folder = write_sample_data(root / "photos", number, 0)
    return [path.read_bytes() for path in sorted((folder / "images").iterdir())]


def weights_of(root: Path, arguments: argparse.Namespace) -> str | None:
    """The checkpoint that all sides serve; for vit_b random weights, whose time is the same."""
    if arguments.model_type == "tiny":
        return arguments.weights
    from samray.checkpoint import save_checkpoint
    from samray.config import load_config
    from samray.model import build_model

    config = load_config(options={"model.type": "vit_b"})
    save_checkpoint(root / "vit_b", build_model("vit_b").state_dict(), config, {})
    return str(root / "vit_b")


def load_sam(weights: str | None) -> Any:
    """The model that all sides serve."""
    import torch

    from samray.predictor import Predictor

    torch.set_num_threads(1)
    return Predictor.from_checkpoint(weights).sam


def in_process(weights: str | None, raw: bytes, number: int) -> dict[str, float]:
    """Median ms of `SamPredictor.set_image` and `predict`."""
    from segment_anything import SamPredictor

    predictor = SamPredictor(load_sam(weights))
    image = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
    times: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(max(3, number // 20)):
        started = time.perf_counter()
        predictor.set_image(image)
        times["encode"].append(1000 * (time.perf_counter() - started))
    for n in range(number):
        started = time.perf_counter()
        (at,) = point(n)["point_coords"]
        predictor.predict(np.array([at], np.float32), np.array([1]))
        times["decode"].append(1000 * (time.perf_counter() - started))
    return {key: statistics.median(values) for key, values in times.items()}


def other_server(kind: str, weights: str | None, port: int) -> None:
    """What people write: FastAPI around `SamPredictor`."""
    import hashlib

    import uvicorn
    from fastapi import FastAPI
    from pycocotools import mask as coco_mask
    from segment_anything import SamPredictor

    predictor, lock = SamPredictor(load_sam(weights)), threading.Lock()
    kept: OrderedDict[str, tuple[Any, Any, Any]] = OrderedDict()
    app = FastAPI()

    @app.get("/v1/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/predict")
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        with lock:
            image_id = body.get("image_id")
            if kind == "lru" and image_id in kept:
                kept.move_to_end(image_id)
                predictor.features, predictor.original_size, predictor.input_size = kept[image_id]
                predictor.is_image_set = True
            else:
                raw = base64.b64decode(body["image"]["base64"])
                image_id = hashlib.sha256(raw).hexdigest()
                predictor.set_image(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
                kept[image_id] = (
                    predictor.features,
                    predictor.original_size,
                    predictor.input_size,
                )
                while len(kept) > 100:
                    kept.popitem(last=False)
            (prompt,) = body["prompts"]
            masks, scores, _ = predictor.predict(
                np.array(prompt["point_coords"], np.float32), np.array(prompt["point_labels"])
            )
        results = []
        for mask, score in zip(masks, scores, strict=True):
            rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            counts = rle["counts"].decode()
            results.append({"score": float(score), "size": rle["size"], "counts": counts})
        return {"image_id": image_id, "masks": results}

    uvicorn.run(app, port=port, log_level="error")


def other_command(kind: str, weights: str | None) -> list[str]:
    """Start one of the servers that people write."""
    return [sys.executable, __file__, kind, *(["--weights", weights] if weights else [])]


def samray_command(weights: str | None, decoders: int = 1) -> list[str]:
    """Start the endpoint."""
    words = [f"serve.decoder_replicas={decoders}", "serve.cpus_per_replica=0.2"]
    words += [f"serve.checkpoint={weights}"] if weights else []
    return [sys.executable, "-m", "jobs.serve", *words]


class Server:
    """A server in a process of its own."""

    def __init__(self, command: list[str], root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command, self.root = [*command, "--port", str(self.port)], root

    def __enter__(self) -> str:
        with open(self.root / "server.log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{self.port}"
        while True:
            assert self.process.poll() is None, (self.root / "server.log").read_text()
            try:
                if requests.get(f"{url}/v1/readyz", timeout=10).status_code == 200:
                    return url
            except requests.RequestException:
                pass
            time.sleep(0.3)

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait()


if __name__ == "__main__":
    main()
