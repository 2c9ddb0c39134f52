"""configs/kuberay, cluster.yaml and Dockerfile: what can be checked without a cluster."""

import copy
import dataclasses
import fnmatch
import importlib
import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path

import kuberay
import kubernetes_validate
import pytest
import ray
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from samray import __version__, cli
from samray.config import ServeConfig

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted((CONFIGS / "kuberay").glob("*.yaml"))
JOBS = ("prepare", "train", "tune")
DEPENDENCIES = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
PAGE = (ROOT / "docs" / "deploy.md").read_text()


def documents(stage):
    return list(yaml.safe_load_all((CONFIGS / "kuberay" / f"{stage}.yaml").read_text()))


def templates(document):
    """Pod templates of a RayJob or RayService, the head's first."""
    spec = document["spec"]
    cluster = spec.get("rayClusterSpec") or spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    found = [group["template"] for group in groups]
    return [*found, spec["submitterPodTemplate"]] if "submitterPodTemplate" in spec else found


def nodes(value):
    """All mappings inside a document."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from nodes(inner)


RAY = [(stage, documents(stage)[0]) for stage in (*JOBS, "serve")]
each_stage = pytest.mark.parametrize(("stage", "document"), RAY, ids=[stage for stage, _ in RAY])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kuberay_and_kubernetes_take_every_document(path):
    for document in yaml.safe_load_all(path.read_text()):
        kuberay.check(document)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("spec", "entrypont"), "x", "entrypont is no field"),
        (("spec", "backoffLimit"), "2", "is not a int"),
        (("spec", "submissionMode"), "Job", "is none of"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "in quotes"),
        (("spec", "rayClusterSpec", "autoscalerOptions", "resources", "limit"), {}, "'limit' was"),
        (("spec", "submitterPodTemplate", "spec", "retartPolicy"), "Never", "'retartPolicy' was"),
    ],
)
def test_the_check_finds_mistakes(where, value, message):
    document = copy.deepcopy(documents("train")[0])
    *parents, key = where
    inner = document
    for parent in parents:
        inner = inner[parent]
    inner[key] = value
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError), match=message):
        kuberay.check(document)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_secrets_are_named_and_not_written(path):
    """Each is one that the page creates; a variable that sounds like a secret refers to one."""
    for document in yaml.safe_load_all(path.read_text()):
        assert document["kind"] != "Secret"
        for node in nodes(document):
            if re.search("KEY|TOKEN|SECRET|PASSWORD", str(node.get("name", "")), re.IGNORECASE):
                assert "value" not in node, node
            names = [node[key]["name"] for key in ("secretKeyRef", "secretRef") if key in node]
            names += [node["secretName"]] if "secretName" in node else []
            for name in names:
                assert re.search(rf"create secret generic {name} \\?\n? *--from", PAGE), name
                key = node.get("secretKeyRef", {}).get("key")
                assert key is None or f"--from-file={key}=" in PAGE, key


@each_stage
def test_a_pod_says_what_it_needs_and_what_it_may_not(stage, document):
    for template in templates(document):
        assert template["metadata"]["labels"]["app"] == "samray", "the NetworkPolicy selects it"
        assert template["metadata"]["labels"]["stage"] == stage
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = template["spec"]["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        for name in ("cpu", "memory"):
            assert name in container["resources"]["requests"]
            assert name in container["resources"]["limits"]
        # A worker's token of the Kubernetes API would be anyone's who runs a task there.
        is_head = template["metadata"]["labels"].get("role") == "head"
        assert template["spec"]["automountServiceAccountToken"] is is_head
        registry, tag = container["image"].rsplit(":", 1)
        assert (registry, tag.split("-")[0]) == ("registry.example.org/samray", __version__)
        if "nvidia.com/gpu" in container["resources"]["limits"]:
            assert tag.endswith("-cuda")
            assert template["spec"]["tolerations"]


@each_stage
def test_ray_asks_for_the_token_and_is_the_version_of_the_image(stage, document):
    cluster = document["spec"].get("rayClusterSpec") or document["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "samray-ray"}
    assert f"ray[data,train,tune,serve,default]=={cluster['rayVersion']}" in DEPENDENCIES
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"]
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] >= 60


@pytest.mark.parametrize("stage", JOBS)
def test_an_entrypoint_is_a_command_that_fits_its_cluster(stage, monkeypatch):
    job = documents(stage)[0]["spec"]
    program, *words = shlex.split(job["entrypoint"])
    assert (program, words[0]) == ("samray", stage)
    seen = []
    entry = dataclasses.replace(cli.STAGES[stage], run=seen.append)
    monkeypatch.setitem(cli.STAGES, stage, entry)
    assert cli.main(words) == 0
    (config,) = seen
    section = getattr(config, stage)
    for folder in (section.data_dir, section.output_dir):
        shared = folder.startswith("s3://BUCKET/") or on_a_volume(folder, documents(stage))
        assert shared, "a folder of one pod is lost with it"
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (config.scaling.device == "gpu")
    assert (config.scaling.cpus_per_worker or 1) <= int(limits["cpu"])
    if stage == "train":
        assert group["minReplicas"] == group["maxReplicas"] == config.scaling.num_workers
        assert config.train.resume, "a second try would refuse the first one's folder"


def on_a_volume(folder, found):
    """Whether all nodes mount a claim of the file there; samray keeps no sweep in S3."""
    document, *others = found
    (claim,) = [other["metadata"]["name"] for other in others if "Claim" in other["kind"]]
    for template in templates(document)[:2]:
        (volume,) = template["spec"]["volumes"]
        assert volume["persistentVolumeClaim"]["claimName"] == claim
        (mount,) = template["spec"]["containers"][0]["volumeMounts"]
        assert mount["name"] == volume["name"]
        assert Path(mount["mountPath"]) in Path(folder).parents
    return True


def test_the_service_is_ray_serves_and_ours():
    from ray.serve.schema import ServeDeploySchema

    service = documents("serve")[0]["spec"]
    content = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = content.applications
    settings = ServeConfig.model_validate(application.args)
    module, function = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert content.http_options.request_timeout_s > settings.timeout_seconds
    assert service["rayClusterDeletionDelaySeconds"] > settings.timeout_seconds
    cluster = service["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
    (group,) = cluster["workerGroupSpecs"]
    replicas = settings.decoder_replicas + settings.encoder_replicas
    assert replicas * settings.gpus_per_replica <= group["minReplicas"]
    for template in templates(documents("serve")[0]):
        (container,) = template["spec"]["containers"]
        assert "SAMRAY_TOKEN" in {variable["name"] for variable in container["env"]}
        assert "readinessProbe" not in container, "the operator's own waits for Serve's proxy"


@pytest.mark.parametrize("stage", [*JOBS, "serve"])
def test_disruption_budgets_match_pods_and_leave_a_way_to_drain(stage):
    document, *others = documents(stage)
    budgets = [other for other in others if "Claim" not in other["kind"]]
    labels = [template["metadata"]["labels"] for template in templates(document)]
    cluster = document["spec"].get("rayClusterSpec") or document["spec"]["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    assert budgets
    for budget in budgets:
        assert budget["kind"] == "PodDisruptionBudget"
        selected = budget["spec"]["selector"]["matchLabels"]
        assert any(selected.items() <= found.items() for found in labels)
        # Kubernetes counts no percentage, and no maxUnavailable, of pods of custom resources.
        assert set(budget["spec"]) == {"minAvailable", "selector"}
        workers = selected["role"] == "worker"
        assert budget["spec"]["minAvailable"] == (group["replicas"] - 1 if workers else 1)


def test_ray_up_takes_the_cluster_file():
    """Ray's own defaults, schema and rules; nothing is asked of AWS."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((CONFIGS / "cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(content)))
    with pytest.raises(Exception, match="idle_minutes"):
        validate_config(prepare_config({**content, "idle_minutes": 5}))
    assert content["docker"]["image"].endswith(f":{__version__}-cuda")
    for start in (content["head_start_ray_commands"], content["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in start[-1]
    assert "--dashboard-host=127.0.0.1" in content["head_start_ray_commands"][-1]
    assert not re.search("(?i)secret|password|AKIA", (CONFIGS / "cluster.yaml").read_text())


def test_the_dockerfile_installs_what_samray_is_tested_with():
    """Read, not built: pinned base, versions of constraints.txt, no root."""
    text = (CONFIGS / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    (base,) = [line for line in lines if line.startswith("FROM ")]
    python = re.fullmatch(r"FROM python:(3\.\d+\.\d+)-slim-\w+", base)
    supported = Requirement(f"samray{importlib.metadata.metadata('samray')['Requires-Python']}")
    assert supported.specifier.contains(python[1])
    (install,) = [line for line in lines if "pip install" in line]
    assert "-c constraints.txt ." in install
    assert lines[-2] == "USER 1000:1000"
    assert not re.search("(?i)password|secret|AKIA|token=[^t]", text)
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    for needed in map(Requirement, DEPENDENCIES):
        if needed.name in pins:
            assert needed.specifier.contains(Version(pins[needed.name])), needed
    assert pins["ray"] == ray.__version__


def test_the_build_gets_what_the_dockerfile_copies_and_nothing_else():
    ignore = (CONFIGS / "Dockerfile.dockerignore").read_text().splitlines()
    assert next(line for line in ignore if not line.startswith("#")) == "*"
    sent = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for line in (CONFIGS / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    assert copied == sent
    for name in sent:
        assert (ROOT / name).exists()
    assert not any(fnmatch.fnmatch("demo/token.txt", name) for name in sent)
