"""The endpoint compared with `SamPredictor` in process and with two common ways to serve it.

    python benchmarks/serve.py click      [--model-type tiny|vit_b]   one warm click
    python benchmarks/serve.py throughput [--clients 32 --clicks 20]  requests a second
    python benchmarks/serve.py encodes                                how often an image is encoded
    python benchmarks/serve.py swap       2,000 clicks during a promotion
    python benchmarks/serve.py kill       kill -9 of a decoder, an ingress and the proxy, under load
    python benchmarks/serve.py soak       [--minutes 10] at 80 % of capacity, then one at 300 %
    python benchmarks/serve.py beside     clicks of two clients beside one expensive request
    python benchmarks/serve.py memory     by process, idle and over 3,000 clicks on 1200 x 900

All use the same weights on the same machine, on its GPU if it has one, and one torch thread per
process. `naive` is FastAPI around `SamPredictor`, the image in every request. `lru` keeps 100
embeddings behind a lock in one process. With encode time E and decode time D, measured here, and c
clicks an image, no server that encodes once can beat the naive one by more than
(E + D) / (E / c + D).
"""

import argparse
import asyncio
import base64
import io
import itertools
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import requests
from PIL import Image

from samray.data.sample_data import write_sample_data

TWO_MODELS = {"first": 0.0, "second": 0.02}  # noise on the shipped decoder's weights


def main() -> None:
    """Run one part, or, as a child, one of the servers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*PARTS, "naive", "lru"])
    parser.add_argument("--model-type", default="tiny", choices=["tiny", "vit_b"])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--clicks", type=int, default=20)
    parser.add_argument("--decoders", type=int, nargs="+", default=[1])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--port", type=int, help="of a child")
    parser.add_argument("--weights", help="of a child, or a RUN; unset: tiny as it ships")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if arguments.what in ("naive", "lru"):
        other_server(arguments.what, arguments.weights, arguments.port)
        return
    with tempfile.TemporaryDirectory(prefix="samray-benchmark-") as folder:
        PARTS[arguments.what](Path(folder), arguments)


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


def swap(root: Path, _: argparse.Namespace) -> None:
    """A promotion after 500 of 2,000 clicks: who answered, and whether with that model's mask."""
    from pycocotools import mask as coco_mask

    from samray.sam.checkpoint import load_checkpoint
    from samray.sam.store import ModelStore

    store, (raw,) = ModelStore(root / "store"), photos(root, 1)
    masks = {name: own_masks(root / name, noise, raw) for name, noise in TWO_MODELS.items()}
    record: dict[str, Any] = {"previous": None, "metrics": {}, "guard": {}}
    versions = [store.add("drawn", load_checkpoint(root / "first"), record)]
    command = [*samray_command(None, 2), f"serve.store={root / 'store'}", "serve.model=drawn"]
    with Server(command, root) as url:
        image_id = requests.post(f"{url}/v1/images", data=raw, timeout=60).json()["image_id"]

        def promote() -> None:
            versions.append(store.add("drawn", load_checkpoint(root / "second"), record))

        answers = asyncio.run(
            click_for(url, [image_id], clients=8, number=2000, after=(500, promote))
        )
    by_version: dict[str, int] = {}
    ious = []
    for answer in answers:
        if answer.status == 200:
            version = answer.body["model"]["version"]
            by_version[version] = by_version.get(version, 0) + 1
            name = "first" if version == versions[0].version else "second"
            expected = masks[name][answer.number % 20]
            rle = answer.body["results"][0]["masks"][0]["rle"]
            mask = coco_mask.decode({**rle, "counts": rle["counts"].encode()}).astype(bool)
            union = np.count_nonzero(mask | expected)
            ious.append(np.count_nonzero(mask & expected) / union if union else 1.0)
    apart = [
        np.count_nonzero(a & b) / np.count_nonzero(a | b)
        for a, b in zip(masks["first"], masks["second"], strict=True)
    ]
    failed = sum(answer.status != 200 for answer in answers)
    print(f"{len(answers)} clicks across a promotion: {failed} failed, answered by {by_version}")
    print(f"IoU with that model's own mask: at least {min(ious):.4f}; the two models' masks differ")
    print(f"  (IoU {statistics.mean(apart):.2f} on average)")


def own_masks(folder: Path, noise: float, raw: bytes) -> list[np.ndarray]:
    """Write a checkpoint, the shipped decoder with noise; return its masks of 20 clicks."""
    import torch

    from samray.config import load_config
    from samray.geometry.prompts import Prompt
    from samray.prediction.predictor import Predictor
    from samray.sam.checkpoint import save_checkpoint
    from samray.sam.shipped import load_shipped

    shipped = load_shipped()
    torch.manual_seed(0)
    weights = {
        name: value + noise * torch.randn_like(value) if name.startswith("mask_decoder") else value
        for name, value in shipped.weights.items()
    }
    save_checkpoint(folder, weights, load_config(), {"epoch": 1, "base": shipped.progress["base"]})
    predictor = Predictor.from_checkpoint(str(folder))
    predictor.set_image(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))
    points = [np.array(point(n)["point_coords"], np.float32) for n in range(20)]
    return [predictor.predict(Prompt(at, np.array([1]))).best for at in points]


def kill(root: Path, _: argparse.Namespace) -> None:
    """Some seconds of clicks by 4 clients; after 6 one part dies. What failed, and for how long."""
    import ray

    with Server(samray_command(None, 2), root) as url:
        for part in ("Decoder", "Encoder", "Ingress"):
            strike_under_load(url, root, f"ServeReplica:samray:{part}")
        strike_under_load(url, root, "ServeController")
    # On a cluster there are proxies, and more of them than this one.
    os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] = "1"
    own = ray.init(address="local", num_cpus=4, log_to_driver=False).address_info["gcs_address"]
    with Server(samray_command(None, 2), root, {"RAY_ADDRESS": own}) as url:
        strike_under_load(url, root, "ProxyActor")


def strike_under_load(url: str, root: Path, part: str) -> None:
    """Kill one process of that name, and print what it cost."""
    ids = [
        requests.post(f"{url}/v1/images", data=raw, timeout=60).json()["image_id"]
        for raw in photos(root, 8)
    ]
    victim = next(pid for pid, name in processes_below(os.getpid()) if part in name)
    killed: list[float] = []

    def strike() -> None:
        time.sleep(6)
        os.kill(victim, signal.SIGKILL)
        killed.append(time.perf_counter())

    threading.Thread(target=strike).start()
    answers = asyncio.run(click_for(url, ids, clients=4, seconds=40))
    bad = [answer for answer in answers if answer.status != 200]
    kinds = sorted({f"{answer.status} {answer.reason()}" for answer in bad})
    good = sorted(answer.ended for answer in answers if answer.status == 200)
    pause = max(b - a for a, b in itertools.pairwise(good))
    back = max((answer.ended for answer in bad), default=killed[0]) - killed[0]
    print(
        f"kill -9 of {part.split(':')[-1]}: {len(answers)} clicks, {len(bad)} failed {kinds}, "
        f"the last {back:.1f} s after; longest pause {pause:.1f} s",
        flush=True,
    )


def soak(root: Path, arguments: argparse.Namespace) -> None:
    """At 80 % of what it can for some minutes, then at 300 % for one; memory, errors, health."""
    with Server(samray_command(None), root) as url:
        ids = [
            requests.post(f"{url}/v1/images", data=raw, timeout=60).json()["image_id"]
            for raw in photos(root, 16)
        ]
        asyncio.run(click_for(url, ids, clients=16, seconds=10))
        started = time.perf_counter()
        answers = asyncio.run(click_for(url, ids, clients=16, seconds=30))
        capacity = len(answers) / (time.perf_counter() - started)
        print(f"capacity, 16 clients: {capacity:.1f} clicks/s", flush=True)
        memory: list[float] = []
        stop = threading.Event()

        def weigh() -> None:
            while not stop.wait(10):
                memory.append(memory_below(os.getpid()) / 2**20)

        weighing = threading.Thread(target=weigh)
        weighing.start()
        answers = asyncio.run(click_steadily(url, ids, 0.8 * capacity, 60 * arguments.minutes))
        stop.set()
        weighing.join()
        print(f"{arguments.minutes:g} minutes at 80 %: {told(answers)}")
        sixth = max(1, len(memory) // 6)
        early, late = statistics.mean(memory[sixth : 2 * sixth]), statistics.mean(memory[-sixth:])
        print(f"  memory {early:.0f} MiB early, {late:.0f} MiB at the end: {late / early - 1:+.1%}")
        health: list[float] = []
        stop.clear()

        def ask_health() -> None:
            while not stop.wait(0.5):
                asked = time.perf_counter()
                requests.get(f"{url}/v1/healthz", timeout=60).raise_for_status()
                health.append(time.perf_counter() - asked)

        asking = threading.Thread(target=ask_health)
        asking.start()
        answers = asyncio.run(click_steadily(url, ids, 3 * capacity, 60, wait=False))
        ended = time.perf_counter()
        stop.set()
        asking.join()
        print(f"1 minute at 300 %: {told(answers)}")
        print(f"  health answered {len(health)} times, at most after {1000 * max(health):.0f} ms")
        body = {"image_id": ids[0], "prompts": [point(0)], "mask_format": "rle"}
        while requests.post(f"{url}/v1/predict", json=body, timeout=60).status_code != 200:
            time.sleep(0.1)
        print(f"  the next click was answered {time.perf_counter() - ended:.2f} s after the end")


def beside(root: Path, _: argparse.Namespace) -> None:
    """Two clients click on small images; a third sends many prompts on one of 12 megapixels."""
    large = io.BytesIO()
    Image.effect_noise((4000, 3000), 60).convert("RGB").save(large, format="JPEG")
    with Server(samray_command(None), root) as url:
        files = [*photos(root, 2), large.getvalue()]
        ids = [
            requests.post(f"{url}/v1/images", data=raw, timeout=600).json()["image_id"]
            for raw in files
        ]
        asyncio.run(click_for(url, ids[:2], clients=2, seconds=5))
        print(f"alone: {told(asyncio.run(click_for(url, ids[:2], clients=2, seconds=20)))}")
        for prompts, multimask in ((256, True), (160, False)):
            body = {"image_id": ids[2], "prompts": [point(n) for n in range(prompts)]}
            body |= {"multimask_output": multimask, "mask_format": "rle"}
            ended: list[str] = []

            def send(body: dict[str, Any] = body, ended: list[str] = ended) -> None:
                started = time.perf_counter()
                answer = requests.post(f"{url}/v1/predict", json=body, timeout=900)
                ended.append(f"{answer.status_code} after {time.perf_counter() - started:.1f} s")

            expensive = threading.Thread(target=send)
            expensive.start()
            answers = asyncio.run(click_for(url, ids[:2], clients=2, seconds=30))
            expensive.join()
            masks = 3 * prompts if multimask else prompts
            print(f"beside {prompts} prompts, {masks} masks ({ended[0]}): {told(answers)}")


def memory(root: Path, _: argparse.Namespace) -> None:
    """What each process holds, shared pages divided among those that share them."""
    with Server(samray_command(None), root) as url:
        print(f"idle: {weighed()}")
        ids = []
        for number in range(20):
            raw = io.BytesIO()
            noise = Image.effect_noise((1200, 900), 20 + number).convert("RGB")
            noise.save(raw, format="JPEG")
            answer = requests.post(f"{url}/v1/images", data=raw.getvalue(), timeout=600)
            ids.append(answer.json()["image_id"])
        for clicks in (300, 2700):
            print(f"{clicks} clicks: {told(asyncio.run(click_for(url, ids, 4, number=clicks)))}")
            print(f"  {weighed()}")


def weighed() -> str:
    """MiB of the endpoint's processes that hold the most, and of all together."""
    held: dict[str, float] = {}
    for pid, name in processes_below(os.getpid()):
        short = name.split("(")[0].split("/")[-1][:40]
        held[short] = held.get(short, 0.0) + held_by(pid) / 2**20
    largest = sorted(held.items(), key=lambda item: -item[1])[:8]
    parts = ", ".join(f"{name} {size:.0f}" for name, size in largest)
    return f"{sum(held.values()):.0f} MiB in all; {parts}"


@dataclass
class Answer:
    """What one click came to; status 0 if there was no answer."""

    number: int
    started: float
    ended: float
    status: int
    body: Any

    def reason(self) -> str:
        """The error's code, or the kind of failure."""
        return str(self.body["error"]["code"]) if self.status else str(self.body)


async def ask(session: aiohttp.ClientSession, url: str, image_id: str, number: int) -> Answer:
    """Send one click on a known image."""
    body = {"image_id": image_id, "prompts": [point(number)], "mask_format": "rle"}
    started = time.perf_counter()
    try:
        async with session.post(f"{url}/v1/predict", json=body) as response:
            answer = await response.json()
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as exc:
        status, answer = 0, type(exc).__name__
    return Answer(number, started, time.perf_counter(), status, answer)


async def click_for(
    url: str,
    ids: list[str],
    clients: int,
    number: int | None = None,
    seconds: float | None = None,
    after: tuple[int, Callable[[], None]] | None = None,
) -> list[Answer]:
    """Clients that click as soon as they are answered; `after` so many, something is done."""
    answers: list[Answer] = []
    sent = 0
    stop = time.perf_counter() + seconds if seconds is not None else float("inf")
    done: list[asyncio.Task[None]] = []

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal sent
        while time.perf_counter() < stop and (number is None or sent < number):
            sent += 1
            if after is not None and sent == after[0]:
                done.append(asyncio.create_task(asyncio.to_thread(after[1])))
            answers.append(await ask(session, url, ids[sent % len(ids)], sent))
            if answers[-1].status != 200:
                await asyncio.sleep(0.1)

    async with patient_session() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    await asyncio.gather(*done)
    return answers


async def click_steadily(
    url: str, ids: list[str], rate: float, seconds: float, wait: bool = True
) -> list[Answer]:
    """So many clicks a second, answered or not.

    Args:
        wait: for the last answers, before it returns.
    """
    started = time.perf_counter()
    asked: list[asyncio.Task[Answer]] = []
    async with patient_session() as session:
        for number in range(int(rate * seconds)):
            ahead = started + number / rate - time.perf_counter()
            if ahead > 0:
                await asyncio.sleep(ahead)
            image_id = ids[number % len(ids)]
            asked.append(asyncio.create_task(ask(session, url, image_id, number)))
            if number % 10 == 0:
                await asyncio.sleep(0)
        if not wait:
            for task in asked:
                if not task.done():
                    task.cancel()
        answers = await asyncio.gather(*asked, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, Answer)]


def patient_session() -> aiohttp.ClientSession:
    """A session without a limit of connections."""
    timeout = aiohttp.ClientTimeout(total=1800)
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0))


def told(answers: list[Answer]) -> str:
    """How many of each status, and how fast the good ones."""
    counts: dict[int, int] = {}
    for answer in answers:
        counts[answer.status] = counts.get(answer.status, 0) + 1
    good = [1000 * (answer.ended - answer.started) for answer in answers if answer.status == 200]
    p50, p95, p99 = np.percentile(good, [50, 95, 99])
    return f"statuses {counts}, answered in p50 {p50:.0f}, p95 {p95:.0f}, p99 {p99:.0f} ms"


def processes_below(parent: int) -> list[tuple[int, str]]:
    """All processes that a process started, and those they started, with their names."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    rows = [
        (int(pid), int(ppid), name) for pid, ppid, name in (line.split(None, 2) for line in listed)
    ]
    family = {parent}
    while more := {pid for pid, ppid, _ in rows if ppid in family} - family:
        family |= more
    return [(pid, name) for pid, _, name in rows if pid in family - {parent}]


def memory_below(parent: int) -> int:
    """Bytes that those processes hold, what they share counted once."""
    return sum(held_by(pid) for pid, _ in processes_below(parent))


def held_by(pid: int) -> int:
    """Bytes that a process holds, what it shares divided among those that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


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

    async with patient_session() as session:
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
    from samray.config import load_config
    from samray.sam.checkpoint import save_checkpoint
    from samray.sam.model import build_model

    config = load_config(options={"model.type": "vit_b"})
    save_checkpoint(root / "vit_b", build_model("vit_b").state_dict(), config, {})
    return str(root / "vit_b")


def load_sam(weights: str | None) -> Any:
    """The model that all sides serve."""
    import torch

    from samray.prediction.predictor import Predictor

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Predictor.from_checkpoint(weights).sam.to(device)


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
    import torch

    words = [f"serve.decoder_replicas={decoders}", "serve.cpus_per_replica=0.2"]
    words += [f"serve.checkpoint={weights}"] if weights else []
    words += ["serve.gpus_per_replica=0.1"] if torch.cuda.is_available() else []
    return [sys.executable, "-m", "jobs.serve", *words]


class Server:
    """A server in a process of its own."""

    def __init__(
        self, command: list[str], root: Path, environment: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.command, self.root = [*command, "--port", str(self.port)], root
        self.environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> str:
        with open(self.root / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.environment
            )
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


PARTS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "click": click,
    "throughput": throughput,
    "encodes": encodes,
    "swap": swap,
    "kill": kill,
    "soak": soak,
    "beside": beside,
    "memory": memory,
}

if __name__ == "__main__":
    main()
