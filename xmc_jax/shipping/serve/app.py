"""The routes of the server; see docs/serve.md."""

import hashlib
import json
import pathlib
from collections.abc import Awaitable, Callable, Sequence
from importlib import metadata
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from xmc_jax.shipping import packed_thumbnails
from xmc_jax.shipping.predictor import Query
from xmc_jax.shipping.serve import bodies, guard, schema
from xmc_jax.shipping.serve.bodies import Refused
from xmc_jax.shipping.serve.model import NEIGHBOURS, ServedModel
from xmc_jax.shipping.serve.service import READY, Service
from xmc_jax.shipping.serve.telemetry import CONTENT_TYPE

Route = Callable[..., Awaitable[fastapi.Response]]

_STATIC = pathlib.Path(__file__).parent / "static"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_PAGE = {"/": "index.html", "/static/app.css": "app.css", "/static/app.js": "app.js"}
_GONE = 499  # the client has gone; nobody sees it
_NOT_SHOWN = (
    "documents: expected no request for training documents, since the server listens to other "
    "machines or was told not to show them; start it with --serve.show_documents"
)
_REFUSALS = {
    400: "Not JSON, or not all of it.",
    403: "Training documents are not shown.",
    404: "No such id.",
    408: "Not all of it in time.",
    413: "Too large.",
    415: "Not JSON.",
    421: "To a host that the server does not go by.",
    422: "Something else than is expected, or more.",
    503: "Too many requests, or not ready; to be tried again.",
}


def create(service: Service) -> guard.Guard:
    """The ASGI application of a service."""
    app = _routes(service)
    posted = ("/v1/predict", "/v1/neighbours")
    return guard.Guard(app, service.config, service.metrics, posted)


def describe(service: Service) -> dict[str, Any]:
    """The OpenAPI description of a service, as /openapi.json has it."""
    return _routes(service).openapi()


def _routes(service: Service) -> fastapi.FastAPI:
    config, requests = service.config, schema.requests(service.config)
    app = fastapi.FastAPI(
        title="xmc_jax",
        version=metadata.version("xmc_jax"),
        description="Ranks labels for documents of texts and images.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # to the address that a proxy knows, not the one that was asked
        responses={status: _refusal(status) for status in (421,)},
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    app.router.route_class = bodies.route_class(config)
    of_post = {status: _refusal(status) for status in (400, 408, 413, 415, 422, 503)}

    async def queries(model: ServedModel, items: Sequence[Any]) -> list[Query]:
        made = []
        for number, item in enumerate(items):
            where = f"queries[{number}]"
            only, exclude = getattr(item, "only", None), getattr(item, "exclude", ())
            for field, names in (("only", only or ()), ("exclude", exclude)):
                for place, name in enumerate(names):
                    if model.row(name) is None:
                        raise Refused(
                            422,
                            f"{where}.{field}[{place}]: expected the id of a label, got "
                            f"{name[:60]!r}{model.predictor.hint(name)}",
                        )
            images = await service.prepare(model, f"{where}.images", item.images)
            if not (images or item.text.strip()):
                raise Refused(422, f"{where}: expected a text or an image, got neither")
            made.append(Query(item.text, images, only, exclude))
        return made

    @app.post("/v1/predict", response_model=schema.PredictionsAnswer, responses=of_post)
    async def predict(body: requests.predict, request: fastapi.Request) -> fastapi.Response:
        """The best labels of each query."""
        model = service.model()
        kind = model.rankings[0] if body.ranking == "auto" else body.ranking
        if kind not in model.rankings:
            raise Refused(
                422,
                "ranking: expected plain, got augmented; the model was exported without documents",
            )
        answer = await service.answer(request, await queries(model, body.queries), kind)
        if answer is None:
            return fastapi.Response(status_code=_GONE)
        results = answer.model.results(answer.scores, answer.rows, answer.cut, body.k, kind)
        return _json({"ranking": kind, "results": results})

    @app.post(
        "/v1/neighbours",
        response_model=schema.NeighboursAnswer,
        responses=of_post | {403: _refusal(403)},
    )
    async def neighbours(body: requests.neighbours, request: fastapi.Request) -> fastapi.Response:
        """The training documents near each query."""
        model = service.model()
        if model.artifact.documents is None:
            raise Refused(
                422, "queries: expected none, got some; the model was exported without documents"
            )
        if not service.config.show_documents:
            raise Refused(403, _NOT_SHOWN)
        answer = await service.answer(request, await queries(model, body.queries), NEIGHBOURS)
        if answer is None:
            return fastapi.Response(status_code=_GONE)
        results = answer.model.results(answer.scores, answer.rows, answer.cut, body.k, NEIGHBOURS)
        return _json({"results": results})

    @app.get("/v1/info", response_model=schema.InfoAnswer, responses={503: _refusal(503)})
    async def info() -> fastapi.Response:
        """The model that is served, and the limits of requests."""
        return _json(service.model().info(service.config))

    for kind in packed_thumbnails.KINDS:
        app.get(
            f"/v1/{kind}/{{name:path}}/image",
            name=f"{kind}_image",
            description=f"The picture of one of the {kind}.",
            response_class=fastapi.Response,
            responses={
                200: {"content": {packed_thumbnails.TYPE: {}}, "description": "A small picture."},
                403: _refusal(403),
                404: _refusal(404),
                503: _refusal(503),
            },
        )(_picture(service, kind))

    @app.get(
        "/v1/labels/{name:path}",
        response_model=schema.LabelAnswer,
        responses={404: _refusal(404), 503: _refusal(503)},
    )
    async def label(name: str) -> fastapi.Response:
        """A label by its id."""
        model = service.model()
        row = model.row(name)
        if row is None:
            raise Refused(404, f"labels: expected the id of a label, got {name[:60]!r}")
        frequency = int(model.artifact.labels.frequency[row])
        return _json(model.label(row) | {"frequency": frequency})

    @app.get("/healthz", response_model=schema.HealthAnswer, responses={503: _refusal(503)})
    async def healthz() -> fastapi.Response:
        """Whether the process answers, and its ranking thread goes on."""
        service.check_not_stuck()
        return _json({"status": service.state})

    @app.get("/readyz", response_model=schema.HealthAnswer, responses={503: _refusal(503)})
    async def readyz() -> fastapi.Response:
        """Whether it answers queries."""
        if service.state != READY:
            raise bodies.busy(f"server: {service.state}; try again")
        service.check_not_stuck()
        return _json({"status": service.state})

    @app.get(
        "/metrics",
        response_class=fastapi.Response,
        responses={200: {"content": {"text/plain": {}}, "description": "For Prometheus."}},
    )
    async def metrics() -> fastapi.Response:
        """What was counted."""
        return fastapi.Response(service.metrics.text(), media_type=CONTENT_TYPE)

    for path, file in _PAGE.items():
        content = (_STATIC / file).read_bytes()
        kind = _TYPES[pathlib.PurePath(file).suffix]
        app.get(path, include_in_schema=False)(_file(content, kind))

    return app


def _picture(service: Service, kind: str) -> Route:
    async def picture(name: str, request: fastapi.Request) -> fastapi.Response:
        if kind == "documents" and not service.config.show_documents:
            raise Refused(403, _NOT_SHOWN)
        pictures = service.model().artifact.thumbnails.get(kind)
        image = None if pictures is None else pictures.get(name)
        if image is None:
            raise Refused(404, f"{kind}: expected an id with a picture, got {name[:60]!r}")
        return _cached(request, image, packed_thumbnails.TYPE, "max-age=3600")

    return picture


def _file(content: bytes, kind: str) -> Route:
    async def page(request: fastapi.Request) -> fastapi.Response:
        return _cached(request, content, kind, "no-cache")

    return page


def _cached(request: fastapi.Request, content: bytes, kind: str, caching: str) -> fastapi.Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {"etag": tag, "cache-control": caching}
    if request.headers.get("if-none-match") == tag:
        return fastapi.Response(status_code=304, headers=headers)
    return fastapi.Response(content, media_type=kind, headers=headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None):
    # What a refused request holds may not be text that can be encoded.
    text = json.dumps(content, ensure_ascii=status != 200, separators=(",", ":"))
    headers = {"cache-control": "no-store"} | (headers or {})
    return fastapi.Response(text.encode(), status, headers, "application/json")


def _refusal(status: int) -> dict[str, Any]:
    return {"model": schema.ErrorAnswer, "description": _REFUSALS[status]}


async def _refused(request: fastapi.Request, error: HTTPException) -> fastapi.Response:
    said, headers = error.detail, dict(error.headers or {})
    if not isinstance(error, Refused):  # of no such path, or another method
        said = f"{request.url.path[:100]}: {said}"
    if headers.get("Allow") == "GET":
        headers["Allow"] = "GET, HEAD"
    return _json({"error": said}, error.status_code, headers)


async def _invalid(request: fastapi.Request, error: RequestValidationError) -> fastapi.Response:
    status, said = schema.explain(error.errors())
    return _json({"error": said}, status)


async def _failed(request: fastapi.Request, error: Exception) -> fastapi.Response:
    return _json({"error": guard.FAILED}, 500)
