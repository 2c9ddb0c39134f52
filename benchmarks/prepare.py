"""Speed and memory of `samray prepare`: CPUs, S3 against disk, number of images.

    python benchmarks/prepare.py cpus  [--num-images 3000]          one CPU against two
    python benchmarks/prepare.py s3    [--num-images 3000]          disk against S3, same machine
    python benchmarks/prepare.py scale [--num-images 2000 20000]   images a second, peak memory

It uses drawn sample images, or those of `--data FOLDER` (JSON and JPEG of one stem). Larger numbers
are copies whose last bytes differ, so that each is a distinct image. Each measured call follows a
small one that starts Ray's workers, and the two sides of a ratio alternate `--rounds` times; the
figures are medians. `s3` needs a server: run `make s3` in another terminal and export the variables
that it prints. To leave a core to the server: `taskset -c 1 make s3` there, and `--cores 0` here,
which keeps both sides on that core.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from samray.data.sample_data import write_sample_data
from samray.storage import Place, remove_folder, resolve, write_bytes

NUM_DRAWN = 200
CALL = """
import json, sys, time
import ray
from samray.config import load_config
from samray.data.prepare import prepare
arguments = json.loads(sys.argv[1])
options = {"address": "local", "num_cpus": arguments["cpus"], "log_to_driver": False}
ray.init(**options, logging_level="ERROR")
for data, output in (arguments["warm_up"], arguments["measured"]):
    started = time.perf_counter()
    prepare(load_config(options={"prepare.data_dir": data, "prepare.output_dir": output}))
    seconds = time.perf_counter() - started
print(seconds)
"""


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["cpus", "s3", "scale"])
    parser.add_argument("--num-images", type=int, nargs="+", metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--cores", type=int, nargs="+", metavar="CORE", help="to run on; unset: all"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="real photos to copy")
    arguments = parser.parse_args()
    if arguments.cores:  # the commands that it starts inherit them
        os.sched_setaffinity(0, arguments.cores)
    with tempfile.TemporaryDirectory(prefix="samray-benchmark-") as folder:
        root = Path(folder)
        drawn = pairs_in(arguments.data or write_sample_data(root / "drawn", NUM_DRAWN, 0))
        copy_images(drawn, root / "small", 256)  # enough to start every worker
        if arguments.what == "scale":
            scale(root, drawn, arguments.num_images or [2000, 20_000])
            return
        number = (arguments.num_images or [3000])[0]
        copy_images(drawn, root / "data", number)
        if arguments.what == "cpus":
            sides = {f"{n} CPU": (root / "data", root, n) for n in (1, 2)}
        else:
            bucket = resolve("s3://samray/benchmark", "bucket")
            remove_folder(bucket)
            copy_images(drawn, bucket / "data", number)
            cpus = len(os.sched_getaffinity(0))
            sides = {"disk": (root / "data", root, cpus), "S3": (bucket / "data", bucket, cpus)}
        compare(root, sides, number, arguments.rounds)


Pairs = list[tuple[Path, Path]]


def pairs_in(folder: Path) -> Pairs:
    """JPEG and JSON of one stem, anywhere below a folder."""
    images = {path.stem: path for path in sorted(folder.rglob("*.jpg"))}
    return [
        (images[path.stem], path) for path in sorted(folder.rglob("*.json")) if path.stem in images
    ]


def copy_images(drawn: Pairs, data: Place, number: int) -> None:
    """Write `number` pairs; the last bytes of each image are unique."""
    for k in range(number):
        image_path, json_path = drawn[k % len(drawn)]
        image = image_path.read_bytes() + k.to_bytes(4, "big")
        document = json.loads(json_path.read_bytes())
        document["imagePath"] = f"../images/{k:06d}.jpg"
        for path, content in (
            (data / "images" / f"{k:06d}.jpg", image),
            (data / "annotations" / f"{k:06d}.json", json.dumps(document).encode()),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)


def compare(
    root: Path, sides: dict[str, tuple[Place, Place, int]], number: int, rounds: int
) -> None:
    """Time two sides alternately and print their ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (data, outputs, cpus) in sides.items():
            took, _, _ = run(root, data, outputs / f"prepared {time.time_ns()}", cpus)
            seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>6}: {number / median:7.1f} images/s  ({median:.1f} s for {number})")
    first, second = medians.values()
    print(f"ratio of times, second to first: {second / first:.2f}")


def scale(root: Path, drawn: Pairs, numbers: list[int]) -> None:
    """Prepare increasing numbers of images; print speed and memory."""
    print(f"{'images':>8} {'images/s':>9} {'driver MiB':>11} {'largest worker MiB':>19}")
    for number in numbers:
        data = root / f"data{number}"
        copy_images(drawn, data, number)
        took, driver, worker = run(root, data, root / f"prepared{number}", os.cpu_count() or 2)
        print(f"{number:>8} {number / took:>9.1f} {driver:>11.0f} {worker:>19.0f}", flush=True)


def run(root: Path, data: Place, output: Place, cpus: int) -> tuple[float, float, float]:
    """Prepare in a separate process.

    Returns:
        seconds of the measured call; peak private memory of the driver and of its largest worker,
        MiB.
    """
    small = [str(root / "small"), str(root / f"small {time.time_ns()}")]
    measured = [str(data), str(output)]
    arguments = json.dumps({"cpus": cpus, "warm_up": small, "measured": measured})
    process = subprocess.Popen(
        [sys.executable, "-c", CALL, arguments], stdout=subprocess.PIPE, text=True
    )
    peaks = {"driver": 0.0, "worker": 0.0}
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peaks, done))
    watcher.start()
    out, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"prepare failed with status {process.returncode}")
    return float(out.splitlines()[-1]), peaks["driver"], peaks["worker"]


def watch(pid: int, peaks: dict[str, float], done: threading.Event) -> None:
    """Record the peak private memory of a driver, and of any Ray process below it."""
    while not done.wait(0.5):
        peaks["driver"] = max(peaks["driver"], private_mib(pid))
        for path in Path("/proc").glob("[0-9]*"):
            try:
                is_worker = b"ray::" in (path / "cmdline").read_bytes()
            except OSError:
                continue
            if is_worker and is_below(int(path.name), pid):
                peaks["worker"] = max(peaks["worker"], private_mib(int(path.name)))


def private_mib(pid: int) -> float:
    """RssAnon of a process; 0 if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def is_below(pid: int, ancestor: int) -> bool:
    """Whether a process descends from another."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


if __name__ == "__main__":
    main()
