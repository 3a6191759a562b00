"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from pagedserve.api.openai_shapes import check_model, json_response
from pagedserve.api.service import Service


async def list_models(service: Service, request: HttpRequest) -> Response:
    """All served models: one."""
    return json_response({"object": "list", "data": [model_card(service)]})


async def get_model(service: Service, request: HttpRequest) -> Response:
    """The served model by its name."""
    check_model(service, request.path_params["id"])
    return json_response(model_card(service))


def model_card(service: Service) -> dict[str, Any]:
    """The served model; `max_model_len` is the context in tokens.

    `pagedserve` is ours: what holds where a request does not say otherwise, and where it is from.
    """
    ready, generation = service.check_available(), service.generation
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.created,
        "owned_by": "pagedserve",
        "max_model_len": ready.max_model_len,
        "pagedserve": {
            "default_sampling_params": generation.defaults,
            "end_token_ids": ready.eos_token_ids,
            "generation_config": generation.source or None,
            "not_applied": generation.not_applied,
            "hf_overrides": service.config.model.hf_overrides or {},
            "chat_template": service.template is not None,
        },
    }
