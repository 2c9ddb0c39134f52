"""What KubeRay's operator accepts, as far as samray's files use it.

Names and types of the fields are facts of KubeRay's API reference of v1.7.0, written down by hand;
the rules are those that its operator checks before it makes a cluster. Pods, services and resources
in them are checked by Kubernetes' own schemas (the package kubernetes-validate), in which unknown
fields fail.
"""

import re

import kubernetes_validate

KUBERNETES = "1.33"
MAX_NAME = 47  # of a RayJob or RayService, from which names of pods are made

STRING, INTEGER, NUMBER, BOOLEAN = (str,), (int,), (int, float), (bool,)
MAP = dict[str, str]

# type -> field -> its type: a tuple of Python types, another type here, [type] for a list of it, a
# set of the allowed words; any other word is a part of Kubernetes' own.
TYPES = {
    "RayJobSpec": {
        "activeDeadlineSeconds": INTEGER,
        "backoffLimit": INTEGER,
        "rayClusterSpec": "RayClusterSpec",
        "submitterPodTemplate": "pod",
        "metadata": MAP,
        "clusterSelector": MAP,
        "submitterConfig": {"backoffLimit": INTEGER},
        "entrypoint": STRING,
        "runtimeEnvYAML": STRING,
        "jobId": STRING,
        "submissionMode": {"K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"},
        "entrypointResources": STRING,
        "entrypointNumCpus": NUMBER,
        "entrypointNumGpus": NUMBER,
        "ttlSecondsAfterFinished": INTEGER,
        "preRunningDeadlineSeconds": INTEGER,
        "shutdownAfterJobFinishes": BOOLEAN,
        "suspend": BOOLEAN,
    },
    "RayServiceSpec": {
        "rayClusterDeletionDelaySeconds": INTEGER,
        "serveService": "service",
        "upgradeStrategy": {"type": {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}},
        "serveConfigV2": STRING,
        "rayClusterConfig": "RayClusterSpec",
        "excludeHeadPodFromServeSvc": BOOLEAN,
        "suspend": BOOLEAN,
    },
    "RayClusterSpec": {
        "authOptions": {"mode": {"disabled", "token"}, "secretName": STRING},
        "autoscalerOptions": {
            "resources": "resources",
            "image": STRING,
            "securityContext": "securityContext",
            "idleTimeoutSeconds": INTEGER,
            "upscalingMode": {"Default", "Aggressive", "Conservative"},
            "version": {"v1", "v2"},
        },
        "enableInTreeAutoscaling": BOOLEAN,
        "gcsFaultToleranceOptions": {
            "backend": {"redis", "rocksdb"},
            "redisAddress": STRING,
            "redisUsername": "credential",
            "redisPassword": "credential",
            "externalStorageNamespace": STRING,
        },
        "headGroupSpec": "HeadGroupSpec",
        "rayVersion": STRING,
        "suspend": BOOLEAN,
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "HeadGroupSpec": {
        "template": "pod",
        "headService": "service",
        "enableIngress": BOOLEAN,
        "resources": MAP,
        "labels": MAP,
        "rayStartParams": MAP,
        "serviceType": {"ClusterIP", "NodePort", "LoadBalancer"},
    },
    "WorkerGroupSpec": {
        "groupName": STRING,
        "replicas": INTEGER,
        "minReplicas": INTEGER,
        "maxReplicas": INTEGER,
        "numOfHosts": INTEGER,
        "idleTimeoutSeconds": INTEGER,
        "priority": INTEGER,
        "resources": MAP,
        "labels": MAP,
        "rayStartParams": MAP,
        "template": "pod",
    },
}


def check(document):
    """Check one document of a file.

    Raises:
        AssertionError: a field is unknown, of another type or of a forbidden value.
        kubernetes_validate.ValidationError: the same of Kubernetes' own objects.
    """
    kind = document["kind"]
    if not document["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    assert document["apiVersion"] == "ray.io/v1", document["apiVersion"]
    assert set(document) == {"apiVersion", "kind", "metadata", "spec"}, sorted(document)
    name = document["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name), name
    assert len(name) <= MAX_NAME, name
    _check(document["spec"], f"{kind}Spec", kind)
    _obey_operator(document["spec"], kind)


def _check(value, expected, path):
    if isinstance(expected, str) and expected in TYPES:
        expected = TYPES[expected]
    if isinstance(expected, dict):
        assert isinstance(value, dict), f"{path}: {value!r} is not a mapping"
        for key, content in value.items():
            assert key in expected, f"{path}.{key} is no field; there are {', '.join(expected)}"
            _check(content, expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert isinstance(value, list), f"{path}: {value!r} is not a list"
        for index, content in enumerate(value):
            _check(content, expected[0], f"{path}[{index}]")
    elif isinstance(expected, set):
        assert value in expected, f"{path}: {value!r} is none of {sorted(expected)}"
    elif expected is MAP:
        assert all(isinstance(key, str) for key in value), f"{path}: keys must be words"
        wrong = {key: text for key, text in value.items() if not isinstance(text, str)}
        assert not wrong, f"{path}: {wrong} must be words, in quotes"
    elif isinstance(expected, tuple):
        assert type(value) in expected, f"{path}: {value!r} is not a {expected[0].__name__}"
    else:
        _check_kubernetes(value, expected)


def _check_kubernetes(value, kind):
    """Check a part of Kubernetes' own, inside the smallest object that holds it."""
    if kind == "service":
        whole = {"apiVersion": "v1", "kind": "Service", **value}
    else:
        container = {"name": "checked"}
        if kind == "credential":
            container["env"] = [{"name": "CHECKED", **value}]
        elif kind != "pod":
            container[kind] = value
        template = value if kind == "pod" else {"spec": {"containers": [container]}}
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "template": template}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def _obey_operator(spec, kind):
    """The operator's rules on values that no schema holds."""
    job = kind == "RayJob"
    cluster = spec["rayClusterSpec" if job else "rayClusterConfig"]
    if job:
        assert spec["backoffLimit"] >= 0
        assert spec.get("activeDeadlineSeconds", 1) > 0
        assert spec.get("preRunningDeadlineSeconds", 1) > 0
        assert spec.get("shutdownAfterJobFinishes") or not spec.get("ttlSecondsAfterFinished")
        if template := spec.get("submitterPodTemplate"):
            assert template["spec"]["restartPolicy"] in ("Never", "OnFailure")
    else:
        assert "name" not in cluster["headGroupSpec"].get("headService", {}).get("metadata", {})
    if cluster.get("authOptions", {}).get("mode") == "token":
        assert [int(part) for part in cluster["rayVersion"].split(".")] >= [2, 52, 0]
    head = cluster["headGroupSpec"]["template"]["spec"]
    environment = {variable["name"] for variable in head["containers"][0].get("env", [])}
    assert not environment & {"REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS"}
    groups = cluster["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in [cluster["headGroupSpec"], *groups]:
        # Autoscaler v2, of Ray 2.47 and later, replaces pods and restarts none.
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never"
        assert not ("resources" in group and "num-cpus" in group["rayStartParams"])
        assert "labels" not in group["rayStartParams"]
    for group in groups:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
