"""All stages with everything in S3, and a server that is killed meanwhile."""

import json
import os
import subprocess
import sys
import threading
import time

import pyarrow.parquet as pq
import pytest
from s3 import READER

from samray.data.dataset import PreparedDataset
from samray.storage import list_folder, list_objects, local_copy, read_bytes, read_json, resolve

PROGRAM = "import sys; from samray.cli import main; sys.exit(main(sys.argv[1:]))"
SEVERAL = """
import json, sys
from samray.cli import main
for line in sys.stdin:
    print(f"\\nstatus: {main(json.loads(line))}", flush=True)
"""


@pytest.fixture
def samray(s3_server):
    """`samray(*words) -> process`: the command line in a process, with a Ray of its own."""

    def start(*words, **environment):
        env = {**os.environ, **s3_server.environment(), **environment}
        env.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", PROGRAM, *map(str, words)]
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


@pytest.fixture(scope="module")
def done(s3_server, tmp_path_factory):
    """`done(*words) -> output`: the same to its end, all in one process: Ray starts once."""
    env = {**os.environ, **s3_server.environment()}
    env["SAMRAY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    env.pop("RAY_ADDRESS", None)
    process = subprocess.Popen(
        [sys.executable, "-c", SEVERAL], env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def run(*words):
        process.stdin.write(json.dumps([str(word) for word in words]) + "\n")
        process.stdin.flush()
        lines = []
        deadline = threading.Timer(400, process.kill)
        deadline.start()
        for line in process.stdout:
            if line.startswith("status: "):
                break
            lines.append(line)
        deadline.cancel()
        assert line == "status: 0\n", "".join(lines)
        return "".join(lines)

    yield run
    process.stdin.close()
    process.wait(60)


@pytest.fixture
def data(photos, s3_server, bucket):
    """`photos`, in the bucket."""
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for path in sorted(photos.rglob("*")):
        if path.is_file():
            key = f"data/{path.relative_to(photos).as_posix()}"
            client.upload_file(str(path), name, key)
    return f"{bucket}/data"


@pytest.mark.slow
def test_all_stages_in_s3(done, data, bucket, prepared):
    folder = f"{bucket}/prepared"
    assert "24 images" in done("prepare", "--data-dir", data, "--output-dir", folder)
    assert "nothing to do" in done("prepare", "--data-dir", data, "--output-dir", folder)
    dataset = PreparedDataset(resolve(folder, "x"))
    assert dataset.digest == PreparedDataset(prepared).digest
    frozen = ["train.warmup_steps=2", "train.max_objects=2", "--freeze-image-encoder"]
    done("train", "--data-dir", folder, "--output-dir", f"{bucket}/run", *frozen, "--num-epochs", 1)
    more = ["--resume", "--num-epochs", 2, "--num-workers", 2, *frozen]
    out = done("train", "--data-dir", folder, "--output-dir", f"{bucket}/run", *more)
    assert "resuming after epoch 1 of 2" in out
    learned = len(dataset.split("train") + dataset.split("val"))
    assert f"embeddings: 0 images to encode, {learned} found" in out
    state = read_json(resolve(f"{bucket}/run/run.json", "x"))
    assert state["status"] == "finished"
    assert len(list_folder(resolve(f"{bucket}/run/tensorboard", "x"))) >= 3  # base and two epochs
    kept = {state["best"], state["latest"]} - {"base"}
    # By objects, because this server lists emptied folders for a while.
    found = {name.rpartition("/")[0] for name, _, _ in list_objects(resolve(f"{bucket}/run", "x"))}
    assert {name for name in found if name.startswith("checkpoints/")} == kept
    assert not [name for name in found if name.startswith("ray")]

    report = f"{bucket}/report"
    words = ["--data-dir", folder, "--checkpoint", f"{bucket}/run", "--output-dir", report]
    done("evaluate", *words, "evaluate.noc_objects=2")
    evaluation = read_json(resolve(f"{report}/evaluation.json", "x"))
    assert evaluation["num_images"] == len(dataset.split("test"))
    assert evaluation["base"]["clicks_to_iou"]["num_objects"] == 2
    assert read_bytes(resolve(f"{report}/instances.csv", "x")).startswith(b"image,source,")
    assert b"</html>" in read_bytes(resolve(f"{report}/report.html", "x"))

    image = f"{data}/images/sample_00000.jpg"
    words = ["--image-path", image, "--output-dir", f"{bucket}/answer", "--point", 120, 80]
    done("predict", "--checkpoint", f"{bucket}/run", *words)
    document = read_json(resolve(f"{bucket}/answer/sample_00000.json", "x"))
    assert document["imagePath"] == "../data/images/sample_00000.jpg"
    assert document["shapes"]


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_prepare(samray, data, bucket, prepared, s3_server):
    folder = resolve(f"{bucket}/prepared", "x")
    words = ["prepare", "--data-dir", data, "--output-dir", folder, "prepare.images_per_shard=1"]
    process = samray(*words)
    deadline = time.monotonic() + 120
    while not any(name.endswith(".json") for name in list_folder(folder / "data")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no shard within two minutes"
        time.sleep(0.05)
    s3_server.kill()
    time.sleep(1)
    s3_server.start()
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    undisturbed, disturbed = PreparedDataset(prepared), PreparedDataset(folder)
    assert disturbed.digest == undisturbed.digest
    assert len(disturbed.manifest["shards"]) == 24
    assert disturbed.manifest["rejected"] == []
    tables = [pq.read_table(local_copy(folder / name)) for name in disturbed.manifest["shards"]]
    rows = [row for table in tables for row in table.to_pylist()]
    shards = [prepared / name for name in undisturbed.manifest["shards"]]
    expected = [row for path in shards for row in pq.read_table(path).to_pylist()]
    assert sorted(rows, key=lambda r: r["name"]) == sorted(expected, key=lambda r: r["name"])


@pytest.mark.slow
def test_an_unreachable_server_ends_prepare_with_one_line(samray, data, bucket, s3_server):
    folder = resolve(f"{bucket}/prepared", "x")
    words = ["prepare", "--data-dir", data, "--output-dir", folder, "prepare.images_per_shard=1"]
    process = samray(*words, AWS_MAX_ATTEMPTS="2")
    while not list_folder(folder / "data"):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    s3_server.kill()
    try:
        out, _ = process.communicate(timeout=200)
    finally:
        s3_server.start()
    assert process.returncode == 2, out
    assert "cannot be reached" in out.splitlines()[-1]
    assert "Traceback" not in out
    assert not (folder / "manifest.json").exists()
    with pytest.raises(Exception, match="manifest"):
        PreparedDataset(folder)


def test_without_permission_to_write_nothing_is_prepared(samray, data, bucket):
    reader = {"AWS_ACCESS_KEY_ID": READER[0], "AWS_SECRET_ACCESS_KEY": READER[1]}
    words = ["prepare", "--data-dir", data, "--output-dir", f"{bucket}/prepared"]
    process = samray(*words, **reader)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 2, out
    assert "no permission" in out
    assert len(out.splitlines()) == 1
    assert list_folder(resolve(bucket, "x")) == ["data"]


@pytest.mark.slow
def test_all_images_of_a_folder_are_segmented_in_s3(done, photos, s3_server, bucket):
    client, name = s3_server.client(), bucket.removeprefix("s3://")
    for number in range(3):
        image = photos / "images" / f"sample_{number:05d}.jpg"
        client.upload_file(str(image), name, f"images/sub/photo {number}.jpg")
    out = f"{bucket}/out"
    words = ["predict", "--image-path", f"{bucket}/images", "--output-dir", out]
    words += ["predict.points_per_side=6", "predict.pred_iou_thresh=0.3"]
    assert "3 images, " in done(*words)
    summary = read_json(resolve(f"{out}/predictions.json", "out"))
    assert summary["images"] == 3
    assert summary["objects"] > 3
    assert not summary["rejected"]
    rows = 0
    for number in range(3):
        target = f"{out}/sub/photo {number}"
        document = read_json(resolve(f"{target}.json", "out"))
        assert document["imagePath"] == f"../../images/sub/photo {number}.jpg"
        assert read_bytes(resolve(f"{target}_labels.png", "out"), 2**24).startswith(b"\x89PNG")
        rows += len(read_bytes(resolve(f"{target}.csv", "out"), 2**24).splitlines()) - 1
    assert rows == summary["objects"]
    assert "3 were done before" in done(*words)
