"""The endpoint for `serve deploy configs/serve.yaml`: `import_path: serve.app:build`."""

from ray.serve import Application

from samray.config import ServeConfig
from samray.endpoint import build_app


def build(arguments: ServeConfig) -> Application:
    """Return the application; `args` of the YAML are the settings of `samray serve`."""
    return build_app(arguments)
