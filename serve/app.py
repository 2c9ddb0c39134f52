"""The endpoint as `serve build` wants it, an application: `serve build serve.app:app -o my.yaml`.

The YAML lists the deployments, to set their replicas and resources one by one. For most, the
shorter `configs/serve.yaml` is enough, which needs samray itself alone on the cluster's nodes.
"""

from samray.config import ServeConfig
from samray.serving.app import build_app

app = build_app(ServeConfig())
