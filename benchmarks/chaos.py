"""Kill what a job runs on at seeded random moments, and compare with undisturbed runs.

    python benchmarks/chaos.py [--faults NAME ...] [--times 2] [--seed 0] [--out chaos.jsonl]

On a real cluster of three nodes on this machine (tests/local_cluster.py), with a real S3 server
behind a proxy. Each try gives a stage's command, strikes at a random moment of the victim's life,
and, if the command fails, gives the same command again. Then prepared data, embeddings, the final
weights and metrics are compared with those of a run that nothing disturbed. The verdicts:

    equal     the command itself ended with the same result
    resumed   it failed or hung; the same command again ended with the same result
    LOST      another result, or the second command failed too
    slow      the second command did not end within --seconds
    missed    the first ended before the strike

Disks that fill up are tmpfs mounts, which need root. `hang` stops a worker with SIGSTOP. `clock`
needs Debian's package libfaketime. A line of JSON a try goes to --out, the table to stdout.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml

from samray.data.sample_data import write_sample_data
from samray.sam.checkpoint import load_checkpoint
from samray.sam.weights import digest_of
from samray.storage import Place, list_objects, read_json, resolve

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from failing_proxy import FailingProxy  # noqa: E402
from local_cluster import LocalCluster  # noqa: E402
from ports import free_port  # noqa: E402
from processes import processes_below  # noqa: E402
from s3 import S3Server  # noqa: E402

NUM_IMAGES = 16
SECONDS = 600  # for a command, before it counts as hung
BRIEF = 1.0  # seconds that a process lives that nobody saw
MAP, ENCODER = r"ray::\S*Map", "ray::ImageEncoder"
WORKER, CONTROLLER = "ray::RayTrainWorker", "ray::TrainController"
TRIAL = r"ray::(ImplicitFunc|run_trial)"
SMALL = ["train.batch_size=4", "train.warmup_steps=1", "train.instances=false"]
SMALL += ["scaling.cpus_per_worker=1", "model.type=tiny", "model.freeze_image_encoder=true"]
SMALL += ["embeddings.reserve_gb=0"]  # of a small disk


@dataclass(frozen=True)
class Fault:
    """What is struck, and when.

    Attributes:
        stage: that runs meanwhile.
        victim: pattern of the process whose life is the time of the strike.
        strike: what is done to it, given the site and its number.
        mend: what a person does before the command is given again.
        place: of the outputs: a folder, a small disk of their own, or S3.
    """

    stage: str
    victim: str
    strike: Callable[["Site", int], None]
    mend: Callable[["Site"], None] = lambda site: None
    place: str = "folder"


class Site:
    """The cluster, the S3 server, the photos, and the results of undisturbed runs.

    Args:
        root: folder for all files.
        num_cpus: of each of the three nodes.
    """

    def __init__(self, root: Path, num_cpus: int = 1) -> None:
        self.root, self.num_cpus = root, num_cpus
        self.s3 = S3Server(root / "s3")
        self.s3.start()
        self.proxy = FailingProxy(self.s3.ports["s3"][0])
        self.variables = {**self.s3.environment(), "AWS_ENDPOINT_URL": self.proxy.url}
        os.environ.update(self.variables)
        self.s3.client().create_bucket(Bucket="chaos")
        photos = write_sample_data(root / "photos", NUM_IMAGES, 3)
        for path in sorted(photos.rglob("*")):
            if path.is_file():
                key = path.relative_to(root).as_posix()
                self.s3.client().upload_file(str(path), "chaos", key)
        self.driver: subprocess.Popen[bytes] | None = None
        self.driver_words: list[str] = []
        self.disk = root / "disk"
        self.disk.mkdir()
        self.expected: dict[str, dict[str, str]] = {}
        self.lives: dict[str, float] = {}
        self.start_cluster()

    def start_cluster(self) -> None:
        """Start three nodes."""
        # Others may use this machine too: Ray would kill workers for their use of memory, and its
        # workers, with a niceness of 15, would hardly run beside them.
        calm = {"RAY_memory_monitor_refresh_ms": "0", "RAY_worker_niceness": "5"}
        calm["OMP_NUM_THREADS"] = "1"
        self.cluster = LocalCluster(3, self.num_cpus, {**self.variables, **calm})
        self.cluster.start()

    def close(self) -> None:
        """End everything that this process has started."""
        self.cluster.stop()
        self.proxy.close()
        self.s3.stop()

    def folder(self, fault: Fault, name: str) -> str:
        """Where a try writes to."""
        if fault.place == "s3":
            return f"s3://chaos/{name}"
        return str((self.disk if fault.place == "disk" else self.root) / name)

    def words(self, stage: str, folder: str) -> list[str]:
        """The command of a stage that writes to a folder."""
        photos = "s3://chaos/photos" if folder.startswith("s3:") else self.root / "photos"
        prepared = self.root / "undisturbed" / "prepared"
        words = {
            "prepare": [
                f"prepare.data_dir={photos}", f"prepare.output_dir={folder}/prepared",
                "prepare.images_per_shard=1",
            ],
            "train": [
                f"train.data_dir={prepared}", f"train.output_dir={folder}/run",
                f"embeddings.cache_dir={folder}/train-cache", "train.num_epochs=3",
                "train.resume=true", "scaling.num_workers=2", "scaling.hang_minutes=1", *SMALL,
            ],
            "tune": [
                f"tune.data_dir={prepared}", f"tune.output_dir={folder}/sweep",
                f"embeddings.cache_dir={folder}/tune-cache", "train.num_epochs=2",
                "tune.num_trials=2", "tune.scheduler=none", *SMALL,
            ],
        }  # fmt: skip
        return [sys.executable, "-m", f"jobs.{stage}", *words[stage]]

    @contextlib.contextmanager
    def running(self, stage: str, folder: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Give a stage's command; what is left of it is killed at the end."""
        self.driver_words = self.words(stage, folder)
        with log.open("wb") as file:
            self.driver = subprocess.Popen(
                self.driver_words, cwd=ROOT, env=self.environment, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield self.driver
        finally:
            if self.driver.poll() is None:
                self.driver.kill()
                self.driver.wait()

    def give(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        """Give another command and wait for its end."""
        return subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=SECONDS
        )

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of the commands."""
        return {**self.cluster.environment, "OMP_NUM_THREADS": "1"}

    def find(self, pattern: str) -> list[int]:
        """The processes of the cluster whose title begins with a pattern."""
        listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout
        rows = [line.split(None, 1) for line in listed.splitlines()]
        named = {int(row[0]) for row in rows if len(row) == 2 and re.match(pattern, row[1])}
        return sorted(named & self.cluster.processes()) if named else []


def kill(site: Site, pid: int) -> None:
    """`kill -9`."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_node(site: Site, pid: int) -> None:
    """A node other than the head, the victim's if it is one."""
    nodes = site.cluster.nodes
    homes = [n for n in range(1, len(nodes)) if pid in processes_below(nodes[n].pid)]
    site.cluster.kill_node(homes[0] if homes else 1)


def add_node(site: Site) -> None:
    """Replace it."""
    if len(site.cluster.nodes) < 3:
        site.cluster.add_node()


def wrong_clock(site: Site, pid: int) -> None:
    """The node of a worker is killed, and a new one's clock is two hours ahead."""
    kill_node(site, pid)
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    site.cluster.add_node(before=f"export LD_PRELOAD={library} FAKETIME=+2h")


def right_clock(site: Site) -> None:
    """Replace it."""
    site.cluster.kill_node(len(site.cluster.nodes) - 1)
    site.cluster.add_node()


def kill_head(site: Site, pid: int) -> None:
    """The head, and the driver, which runs on it."""
    assert site.driver is not None
    site.driver.kill()
    site.cluster.kill_node(0)


def new_cluster(site: Site) -> None:
    """As a person does who has lost the head."""
    site.cluster.stop()
    site.start_cluster()


def restart_s3(site: Site, pid: int) -> None:
    """`kill -9` of the server, which is away for two seconds."""
    site.s3.kill()
    time.sleep(2)
    site.s3.start()


def overload_s3(site: Site, pid: int) -> None:
    """503 for five seconds, then no answer for ten; what was sent then is never answered."""
    for mode, seconds in (("503", 5), ("silent", 10), ("pass", 0)):
        site.proxy.fail(mode)
        time.sleep(seconds)


def fill_disk(site: Site, pid: int) -> None:
    """Leave no byte free on the small disk."""
    with contextlib.suppress(OSError), (site.disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    with contextlib.suppress(OSError), (site.disk / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(2**9))


def free_disk(site: Site) -> None:
    """Make room again."""
    (site.disk / "filler").unlink(missing_ok=True)


def stop_process(site: Site, pid: int) -> None:
    """It neither ends nor answers."""
    os.kill(pid, signal.SIGSTOP)


def stop_job(site: Site, pid: int) -> None:
    """SIGTERM to the driver, as `ray job stop`, which kills it after three seconds."""
    assert site.driver is not None
    site.driver.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        site.driver.wait(3)
    site.driver.kill()


def submit_again(site: Site, pid: int) -> None:
    """The same command, while the first one runs; it has to be refused."""
    done = site.give(site.driver_words)
    assert done.returncode == 2, done.stderr
    assert "is in use by process" in done.stderr, done.stderr


def run_beside(site: Site, pid: int) -> None:
    """Another run, with another seed, on the same prepared dataset and the same cache."""
    other = [f"{w}2" if w.startswith("train.output_dir") else w for w in site.driver_words]
    done = site.give([*other, "scaling.num_workers=1", "train.seed=1"])
    assert done.returncode == 0, done.stderr


FAULTS = {
    "prepare-worker": Fault("prepare", MAP, kill),
    "s3-kill": Fault("prepare", MAP, restart_s3, place="s3"),
    "s3-503": Fault("prepare", MAP, overload_s3, place="s3"),
    "encoder": Fault("train", ENCODER, kill),
    "disk-cache": Fault("train", ENCODER, fill_disk, free_disk, place="disk"),
    "train-worker": Fault("train", WORKER, kill),
    "train-controller": Fault("train", CONTROLLER, kill),
    "node": Fault("train", WORKER, kill_node, add_node),
    "clock": Fault("train", WORKER, wrong_clock, right_clock),
    "disk-output": Fault("train", WORKER, fill_disk, free_disk, place="disk"),
    "head": Fault("train", WORKER, kill_head, new_cluster),
    "hang": Fault("train", WORKER, stop_process),
    "trial": Fault("tune", TRIAL, kill),
    "job-stop": Fault("train", WORKER, stop_job),
    "same-command": Fault("train", WORKER, submit_again),
    "run-beside": Fault("train", ENCODER, run_beside),
}
SERVED = {"serve-replica": "Decoder", "ingress": "Ingress"}


def main() -> None:
    """Try each fault so many times."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*FAULTS, *SERVED]
    parser.add_argument("--faults", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="before a command hangs")
    parser.add_argument("--out", type=Path, default=Path("chaos.jsonl"))
    arguments = parser.parse_args()
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, signal.default_int_handler)  # whatever the shell has set
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="samray-chaos-") as folder:
        site = Site(Path(folder))
        try:
            run_undisturbed(
                site, {FAULTS[name].stage for name in arguments.faults if name in FAULTS}
            )
            for number in range(arguments.times):
                for name in arguments.faults:
                    moment = random.Random(f"{arguments.seed} {name} {number}").random()
                    attempt = try_served if name in SERVED else try_fault
                    row = attempt(
                        site, name, f"{name}-{arguments.seed}-{number}", moment, arguments
                    )
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        finally:
            site.close()
    print(table(rows))


def run_undisturbed(site: Site, stages: set[str]) -> None:
    """Run each stage once, keep its result, and measure how long each kind of process lives."""
    folder = site.root / "undisturbed"
    folder.mkdir()
    for stage in ("prepare", "train", "tune"):
        if stage not in {"prepare", *stages}:
            continue
        log = site.root / f"{stage}.log"
        victims = {fault.victim for fault in FAULTS.values() if fault.stage == stage}
        began = time.monotonic()
        with site.running(stage, str(folder), log) as driver:
            seen: dict[str, float] = {}
            while driver.poll() is None:
                for victim in victims:
                    if site.find(victim):
                        seen.setdefault(victim, time.monotonic())
                        site.lives[victim] = time.monotonic() - seen[victim]
                time.sleep(0.1)
        assert driver.returncode == 0, log.read_text()
        site.expected[stage] = result(stage, str(folder))
        print(f"undisturbed {stage}: {time.monotonic() - began:.0f} s", flush=True)
    print({pattern: round(life, 1) for pattern, life in site.lives.items()}, flush=True)


def try_fault(
    site: Site, name: str, place: str, moment: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Strike a stage once; return the row of the table.

    Args:
        moment: of the victim's life, from 0 to 1.
    """
    fault = FAULTS[name]
    with small_disk(site.disk) if fault.place == "disk" else contextlib.nullcontext():
        return _try_fault(site, name, fault, site.folder(fault, place), moment, arguments)


def _try_fault(
    site: Site, name: str, fault: Fault, folder: str, moment: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    if fault.stage != "prepare" and fault.victim != ENCODER:  # spare the time of encoding
        cache = f"{fault.stage}-cache"
        shutil.copytree(site.root / "undisturbed" / cache, Path(folder, cache))
    log, began = site.root / f"{folder.rpartition('/')[2]}.log", time.monotonic()
    with site.running(fault.stage, folder, log) as driver:
        life = site.lives.get(fault.victim, BRIEF)
        struck = strike_when_it_lives(site, fault, moment * life, driver)
        try:
            status: int | None = driver.wait(arguments.seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(driver.pid, signal.SIGINT)  # as Ctrl-C, which a person gives
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(60)
    row: dict[str, Any] = {"fault": name, "stage": fault.stage, "moment": round(moment, 3)}
    row |= {"status": status, "said": last_line(log), "traceback": "Traceback" in log.read_text()}
    row["seconds"] = round(time.monotonic() - began)
    fault.mend(site)
    if status != 0:
        before = finished_items(folder)
        again = site.root / f"{log.stem}-again.log"
        row["again"] = None
        with (
            site.running(fault.stage, folder, again) as driver,
            contextlib.suppress(subprocess.TimeoutExpired),
        ):
            row["again"] = driver.wait(arguments.seconds)
        after = finished_items(folder)
        row["said_again"] = last_line(again)
        row["redone"] = sum(after.get(item) != stamp for item, stamp in before.items())
        row["kept"] = len(before)
    ended = status == 0 or row.get("again") == 0
    found = result(fault.stage, folder) if ended else {}
    expected = site.expected[fault.stage]
    row["differs"] = sorted(key for key in expected if found.get(key) != expected[key])
    if not struck:
        row["verdict"] = "missed"
    elif not ended and row["again"] is None:
        row["verdict"] = "slow"
    else:
        row["verdict"] = "LOST" if row["differs"] else "equal" if status == 0 else "resumed"
    row["left"] = leftovers(folder)
    return row


def strike_when_it_lives(
    site: Site, fault: Fault, delay: float, driver: subprocess.Popen[bytes]
) -> bool:
    """Wait for the victim, then so many seconds, and strike; whether there was time for it."""
    while not (found := site.find(fault.victim)):
        if driver.poll() is not None:
            return False
        time.sleep(0.05)
    time.sleep(delay)
    found = site.find(fault.victim) or found  # one may have replaced another
    if driver.poll() is not None:
        return False
    fault.strike(site, found[-1])
    return True


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of 96 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "none", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def result(stage: str, folder: str) -> dict[str, str]:
    """Digests of everything that a stage has made and that must not depend on faults."""
    if stage == "prepare":
        manifest = read_json(resolve(f"{folder}/prepared/manifest.json", "chaos"))
        return {"prepared": manifest["digest"], "splits": digest(manifest["splits"])}
    made = {"embeddings": digest(sorted(embeddings(folder, stage).items()))}
    if stage == "train":
        run = resolve(f"{folder}/run", "chaos")
        state = read_json(run / "run.json")
        epochs = [{k: v for k, v in e.items() if k != "seconds"} for e in state["epochs"]]
        weights = load_checkpoint(run / state["latest"]).weights
        made |= {"weights": digest_of(weights), "metrics": digest([epochs, state["best"]])}
        return made | {"status": state["status"]}
    state = read_json(resolve(f"{folder}/sweep/sweep.json", "chaos"))
    trials = [[t["settings"], t["curve"], t["status"]] for t in state["trials"]]
    return made | {
        "trials": digest(sorted(trials, key=json.dumps)),
        "best": digest([state["best_settings"], state["test"]]),
    }


def digest(content: Any) -> str:
    """sha256 of content as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def embeddings(folder: str, stage: str) -> dict[str, str]:
    """sha256 of each embedding, by name."""
    files = Path(folder, f"{stage}-cache").rglob("*.npy")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def finished_items(folder: str) -> dict[str, Any]:
    """When each shard and embedding was written."""
    if folder.startswith("s3:"):
        found = list_objects(resolve(f"{folder}/prepared", "chaos"))
        return {name: tag for name, _, tag in found if name.endswith(".parquet")}
    files = [*Path(folder).rglob("part-*.json"), *Path(folder).rglob("*.npy")]
    return {str(path): path.stat().st_mtime_ns for path in files if not path.name.startswith(".")}


def leftovers(folder: str) -> list[str]:
    """Temporary files and locks that nobody will remove."""
    place: Place = resolve(folder, "chaos")
    if isinstance(place, Path):
        names = [path.relative_to(place).as_posix() for path in place.rglob("*")]
    else:
        names = [name for name, _, _ in list_objects(place)]
    return [n for n in names if n.endswith((".tmp", ".lock")) or n.endswith("preparing.json")]


def last_line(log: Path) -> str:
    """The last line that a command printed."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""


def try_served(
    site: Site, name: str, place: str, moment: float, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Kill a replica under clicks of two clients; compare every answer."""
    with endpoint(site) as url:
        photos = sorted((site.root / "photos" / "images").iterdir())[:4]
        expected = {photo: click(url, photo) for photo in photos}
        outcomes: list[tuple[float, bool | None]] = []
        stop = threading.Event()

        def keep_clicking(first: int) -> None:
            for number in range(first, 10**6):
                if stop.is_set():
                    return
                photo = photos[number % len(photos)]
                try:
                    same: bool | None = click(url, photo) == expected[photo]
                except requests.RequestException:
                    same = None  # refused or broken: asked again
                outcomes.append((time.monotonic(), same))

        clients = [threading.Thread(target=keep_clicking, args=(n,)) for n in (0, 2)]
        for client in clients:
            client.start()
        time.sleep(2 + 4 * moment)
        kill(site, site.find(f"ray::ServeReplica:samray:{SERVED[name]}")[-1])
        struck, deadline = time.monotonic(), time.monotonic() + arguments.seconds
        time.sleep(20)
        while any(same is not True for _, same in outcomes[-10:]) and time.monotonic() < deadline:
            time.sleep(0.5)
        stop.set()
        for client in clients:
            client.join()
    failed = [when for when, same in outcomes if same is None]
    wrong = any(same is False for _, same in outcomes)
    back = outcomes[-1][1] is True
    verdict = "LOST" if wrong or not back else "resumed" if failed else "equal"
    return {
        "fault": name, "stage": "serve", "moment": round(moment, 3), "verdict": verdict,
        "clicks": len(outcomes), "failed": len(failed),
        "seconds": round(max(failed, default=struck) - struck, 1),
    }  # fmt: skip


@contextlib.contextmanager
def endpoint(site: Site) -> Iterator[str]:
    """Deploy configs/serve.yaml on a free port of the head alone, as all nodes share one host."""
    content = yaml.safe_load((ROOT / "configs" / "serve.yaml").read_text())
    content["http_options"]["port"] = port = free_port()
    content["proxy_location"] = "HeadOnly"
    content["applications"][0]["args"]["cpus_per_replica"] = 0.2
    config = site.root / "serve.yaml"
    config.write_text(yaml.safe_dump(content))
    dashboard = {"RAY_DASHBOARD_ADDRESS": site.cluster.dashboard}
    environment = {**site.cluster.environment, **dashboard}
    subprocess.run(["serve", "deploy", config], env=environment, check=True, capture_output=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
    while True:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/v1/readyz", timeout=30).status_code == 200:
                break
        assert time.monotonic() < deadline, "the endpoint is not ready"
        time.sleep(0.5)
    try:
        yield url
    finally:
        subprocess.run(
            ["serve", "shutdown", "-y"], env=environment, check=True, capture_output=True
        )


def click(url: str, photo: Path) -> str:
    """A click's mask."""
    body = {"prompts": [{"point_coords": [[100, 80]]}], "mask_format": "rle"}
    answer = requests.post(
        f"{url}/v1/predict",
        files={"image": photo.read_bytes()},
        data={"request": json.dumps(body)},
        timeout=60,
    )
    answer.raise_for_status()
    return digest([mask["rle"] for mask in answer.json()["results"][0]["masks"]])


def table(rows: list[dict[str, Any]]) -> str:
    """A line of Markdown a fault: times tried, and how often it ended in which way."""
    verdicts = ("equal", "resumed", "LOST", "slow", "missed")
    lines = [f"| fault | tried | {' | '.join(verdicts)} |", "|---" * 7 + "|"]
    for name in dict.fromkeys(row["fault"] for row in rows):
        counts = collections.Counter(row["verdict"] for row in rows if row["fault"] == name)
        cells = " | ".join(str(counts[verdict]) for verdict in verdicts)
        lines.append(f"| {name} | {counts.total()} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
