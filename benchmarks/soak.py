"""Prepare, train and click in a loop on one cluster: what grows, and what is left behind.

    python benchmarks/soak.py [--minutes 60] [--clicks 200] [--out soak.jsonl]

A real cluster of three nodes and a real S3 server on this machine, as `benchmarks/chaos.py` has
them. In each round photos are prepared from S3 into S3, a model is trained on them by two workers,
and a served model answers clicks. A line of JSON a round goes to --out: its seconds, the peak
memory of the two commands, and for each kind of process that stays its number, private memory in
MiB and open files. Each round must give the same dataset, weights and masks as the first. The last
line, also on stdout, compares the second round, which has warmed up, with the last, and lists what
the rounds have left: actors that are not the endpoint's, temporary files and locks, unfinished
uploads.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from chaos import ROOT, SMALL, Site, click, digest, endpoint, leftovers

from samray.sam.checkpoint import load_checkpoint
from samray.sam.weights import digest_of
from samray.storage import list_objects, read_json, resolve

KINDS = {
    "raylet": r"\S*/raylet/raylet ",
    "gcs_server": r"\S*/gcs/gcs_server ",
    "dashboard": r".*dashboard/dashboard\.py|.*dashboard/agent\.py|ray-dashboard",
    "replicas": r"ray::ServeReplica",
    "endpoint": r"ray::(ServeController|ProxyActor|\S*Vault)",
    "idle workers": r"ray::IDLE",
}


def main() -> None:
    """Repeat the round until the time is over."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clicks", type=int, default=200, help="in each round")
    parser.add_argument("--out", type=Path, default=Path("soak.jsonl"))
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="samray-soak-") as folder:
        # Two CPUs a node: the endpoint's replicas may take a share of one on two of the nodes.
        site = Site(Path(folder), num_cpus=2)
        try:
            with endpoint(site) as url:
                rows = []
                while time.monotonic() < end or len(rows) < 2:
                    rows.append(one_round(site, url, len(rows), arguments.clicks))
                    write(arguments.out, rows[-1])
                    assert rows[-1]["result"] == rows[0]["result"], "another result"
                summary = compared(rows) | {"left": left(site)}
                write(arguments.out, summary)
                print(json.dumps(summary, indent=2))
        finally:
            site.close()


def write(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON."""
    with path.open("a") as file:
        print(json.dumps(line), file=file, flush=True)


def one_round(site: Site, url: str, number: int, clicks: int) -> dict[str, Any]:
    """Prepare, train and click; return what it took and what runs afterwards."""
    started = time.monotonic()
    folder = f"s3://chaos/round-{number}"
    prepared, run = f"{folder}/prepared", site.root / f"run-{number}"
    peaks = {
        "prepare": peak(site, "prepare", f"--data-dir=s3://chaos/photos --output-dir={prepared}"),
        "train": peak(
            site,
            "train",
            f"--data-dir={prepared} --output-dir={run} --num-epochs=2 --num-workers=2",
            *SMALL,
        ),
    }
    photos = sorted((site.root / "photos" / "images").iterdir())
    masks = [click(url, photos[place % len(photos)]) for place in range(clicks)]
    state = read_json(run / "run.json")
    made = {
        "prepared": read_json(resolve(f"{prepared}/manifest.json", "soak"))["digest"],
        "weights": digest_of(load_checkpoint(run / state["latest"]).weights),
        "masks": digest(masks),
    }
    seconds = round(time.monotonic() - started, 1)
    return {"round": number, "seconds": seconds, "peaks_mib": peaks, "result": made} | running(site)


def peak(site: Site, stage: str, options: str, *words: str) -> int:
    """Run a stage; return the peak of its own process's resident memory, in MiB."""
    command = ["python", "-m", f"jobs.{stage}", *options.split(), *words]
    log = site.root / f"{stage}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=site.environment, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, log.read_text()
    return used.ru_maxrss // 1024


def running(site: Site) -> dict[str, Any]:
    """Number, private memory and open files of the processes that stay, by kind."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for pid in site.cluster.processes():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            status = Path(f"/proc/{pid}/status").read_text()
            files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        except OSError:  # it has ended
            continue
        kind = next((kind for kind, like in KINDS.items() if re.match(like, command)), "others")
        private = re.search(r"RssAnon:\s+(\d+)", status)
        one = (1, int(private[1]) // 1024 if private else 0, files)
        found[kind] = [a + b for a, b in zip(found[kind], one, strict=True)]
    return {"processes": dict(sorted(found.items()))}


def compared(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The second round beside the last."""
    first, last = rows[1], rows[-1]
    kinds = {**first["processes"], **last["processes"]}
    none = [0, 0, 0]
    return {
        "rounds": len(rows),
        "peaks_mib": [first["peaks_mib"], last["peaks_mib"]],
        "number, MiB, files": {
            kind: [first["processes"].get(kind, none), last["processes"].get(kind, none)]
            for kind in kinds
        },
    }


def left(site: Site) -> dict[str, Any]:
    """What nothing will use any more."""
    listed = site.cluster.ask("/api/v0/actors?limit=1000")["data"]["result"]["result"]
    alive = [actor["class_name"] for actor in listed if actor["state"] == "ALIVE"]
    uploads = site.s3.client().list_multipart_uploads(Bucket="chaos").get("Uploads", [])
    rounds = sorted({name.split("/")[0] for name, _, _ in list_objects(resolve("s3://chaos", "x"))})
    temporary = [name for one in rounds for name in leftovers(f"s3://chaos/{one}")]
    temporary += [name for run in site.root.glob("run-*") for name in leftovers(str(run))]
    return {
        "actors": [name for name in alive if "Serve" not in name and "Proxy" not in name],
        "temporary": temporary,
        "uploads": [upload["Key"] for upload in uploads],
    }


if __name__ == "__main__":
    main()
