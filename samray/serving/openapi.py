"""The OpenAPI document: what FastAPI cannot see of the requests that the routes read themselves."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from samray.prediction.requests import ErrorAnswer, ImageRequest, PredictRequest, SegmentRequest


def request_body(model: type[ImageRequest]) -> dict[str, Any]:
    """Return what `describe_api` needs of a route whose request may bring its image."""
    # Of `SegmentRequest` every field has a default, so that a form may bring the image alone.
    fields = ["image", "request"] if model is SegmentRequest else ["request"]
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "anyOf": [{"required": [field]} for field in fields],
                        "properties": {
                            "image": {"type": "string", "format": "binary"},
                            "request": {
                                "type": "string",
                                "contentMediaType": "application/json",
                                "description": f"a {model.__name__}, without image",
                            },
                        },
                    }
                },
            },
        }
    }


IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
PREVIEW_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the image as an 8-bit PNG, grey or RGB",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route: these statuses, and those that any route can have."""
    return {
        code: {"model": ErrorAnswer} for code in (*codes, 401, 403, 408, 413, 422, 429, 500, 503)
    }


def describe_api(app: FastAPI, needs_token: bool) -> dict[str, Any]:
    """Return FastAPI's document with the schemas of the requests and the token's scheme."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    template = "#/components/schemas/{model}"
    for model in (PredictRequest, SegmentRequest):
        schema = model.model_json_schema(ref_template=template)
        document["components"]["schemas"] |= schema.pop("$defs")
        document["components"]["schemas"][model.__name__] = schema
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    if needs_token:
        document["security"] = [{"token": []}]
    return document
