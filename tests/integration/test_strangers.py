"""An endpoint that listens to all, without a token: who is answered."""

import pytest
import ray
import requests
from serving import serving

from samray.config import ServeConfig


@pytest.mark.slow
def test_strangers_are_refused_where_a_cluster_listens_without_a_token(ray_cluster, monkeypatch):
    """`serve deploy` opens the port by itself, so each request is looked at as well."""
    monkeypatch.delenv("SAMRAY_TOKEN", raising=False)
    own = ray.util.get_node_ip_address()
    if own.startswith("127."):
        pytest.skip("this machine has no address but its loopback")
    with serving(ServeConfig(cpus_per_replica=0.2), proxies=True, host="0.0.0.0") as here:
        outside = here.replace("127.0.0.1", own)
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/openapi.json"),
            ("GET", "/metrics"),
            ("POST", "/v1/predict"),
            ("POST", "/v1/images"),
            ("POST", "/compat/labelstudio/predict"),
        ):
            refused = requests.request(method, outside + path, data=b"{}", timeout=60)
            assert refused.status_code == 403
            assert refused.json()["error"]["code"] == "forbidden"
        assert requests.get(f"{outside}/v1/healthz", timeout=60).status_code == 200
        assert requests.get(f"{here}/v1/models", timeout=60).status_code == 200
