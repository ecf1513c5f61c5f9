"""The ASGI application: addresses, keys, limits, streams. What bodies say is in :mod:`pyrformer.serve.protocol`."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pyrformer.errors import Error, InputError
from pyrformer.fields import parse_json
from pyrformer.model import Model
from pyrformer.serve import protocol
from pyrformer.serve.engine import Completion, Echo, Embedding, Engine, Full, Stopping, TimedOut, Token
from pyrformer.serve.protocol import BadRequest, Limits
from pyrformer.serve.server import Settings
from pyrformer.serve.template import chat_template

#: Names of this machine to itself; without a key, requests to others are refused: a page in a browser may have had
#: its own name point here (DNS rebinding).
LOCAL = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?", re.IGNORECASE)
#: Seconds in which a body must have come.
BODY_SECONDS = 30.0


class _Body(HTTPException):
    """An answer other than success, with a body in OpenAI's shape."""

    def __init__(
        self, status: int, message: str, kind: str, headers: dict[str, str] | None = None, **more: Any
    ):
        super().__init__(status, message, headers)
        self.body = protocol.error_body(message, kind, **more)


def _refusal(e: Error) -> _Body:
    """The answer that an error becomes."""
    if isinstance(e, Full):
        return _Body(429, str(e), "rate_limit_error", {"Retry-After": str(e.seconds)}, code="queue_full")
    if isinstance(e, Stopping):
        return _Body(503, str(e), "server_error", {"Retry-After": "5"}, code="stopping")
    if isinstance(e, TimedOut):
        return _Body(504, str(e), "server_error", code="timeout")
    if isinstance(e, BadRequest):
        return _Body(e.status, str(e), "invalid_request_error", param=e.param, code=e.code)
    if isinstance(e, InputError):
        return _Body(400, str(e), "invalid_request_error")
    return _Body(500, str(e), "server_error")


class Served:
    """A model under its name, with an engine and limits of its own."""

    def __init__(self, name: str, model: Model, settings: Settings):
        length = min(settings.max_length, model.family.max_positions)
        self.name, self.model = name, model
        self.limits = Limits(length, settings.max_rows, settings.max_waiting)
        self.template = chat_template(model, settings.chat_template) if model.tokenizer else None
        self.engine = Engine(model, rows=settings.max_rows, slots=length, waiting=settings.max_waiting)


class Server:
    """The application of some models. ``app`` is for an ASGI server; its end ends the engines.

    Args:
        models: by their names for clients; the first answers those that name none.
    """

    def __init__(self, models: dict[str, Model], settings: Settings):
        self.settings = settings
        self.served = {name: Served(name, model, settings) for name, model in models.items()}
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.one_model)),
            Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/embeddings", self._guarded(self.embeddings), methods=["POST"]),
        ]
        handlers: dict[Any, Any] = {
            HTTPException: _on_refusal,
            ClientDisconnect: _on_leave,
            Exception: _on_fault,
        }
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(one.engine.stop) for one in self.served.values()))

    def _guarded(
        self, handle: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Checks who asks; turns our errors into answers."""

        async def guarded(request: Request) -> Response:
            key = self.settings.api_key
            if key is None:
                if not LOCAL.fullmatch(request.headers.get("host", "")):
                    raise _Body(
                        403, "only this machine may ask", "invalid_request_error", code="forbidden_host"
                    )
            elif not hmac.compare_digest(
                request.headers.get("authorization", "").encode(), f"Bearer {key}".encode()
            ):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                headers = {"WWW-Authenticate": "Bearer"}
                raise _Body(401, message, "invalid_request_error", headers, code="invalid_api_key")
            try:
                return await handle(request)
            except Error as e:
                raise _refusal(e) from None

        return guarded

    async def health(self, _: Request) -> Response:
        engines = [one.engine for one in self.served.values()]
        running, waiting = sum(e.running for e in engines), sum(e.waiting for e in engines)
        return JSONResponse({"status": "ok", "running": running, "waiting": waiting})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(name) for name in self.served]})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(_card(self._named(request.path_params["name"]).name))

    def _named(self, name: Any) -> Served:
        """The model of a name, the first without one."""
        if name is None:
            return next(iter(self.served.values()))
        if not isinstance(name, str):
            raise BadRequest(f"model must be a name, got {name!r}", "model")
        if name not in self.served:
            message = f"there is no model {name!r} here, only {', '.join(map(repr, self.served))}"
            raise BadRequest(message, "model", 404, "model_not_found")
        return self.served[name]

    def _asked(self, body: Any) -> Served:
        return self._named(body.get("model") if isinstance(body, dict) else None)

    async def _json(self, request: Request) -> Any:
        """The body, within its limits."""
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise BadRequest("the body must be JSON: send it with Content-Type: application/json", status=415)
        most, data = self.settings.max_body, bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                data.extend(chunk)
                if len(data) > most:
                    raise BadRequest(f"the body is larger than {most} bytes", status=413)

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
            # Texts are turned into ids in a thread, too: both take a while for a large body.
            return await asyncio.to_thread(parse_json, bytes(data))
        except (TimeoutError, asyncio.TimeoutError):  # two classes until Python 3.11
            raise BadRequest(f"the body did not come within {BODY_SECONDS:g} seconds", status=408) from None
        except (ValueError, RecursionError) as e:
            if isinstance(e, BadRequest):
                raise
            raise BadRequest(f"the body is not JSON: {e}") from None

    async def embeddings(self, request: Request) -> Response:
        body = await self._json(request)
        one = self._asked(body)
        texts, in_base64 = await asyncio.to_thread(protocol.read_embedding, body, one.model, one.limits)
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        job = Embedding(texts, self.settings.timeout, lambda x: _tell(loop, inbox, x))
        one.engine.submit([job])
        async with _attended(request, inbox, [job]):
            found = await _next(inbox)
        if isinstance(found, Error):
            raise found
        return JSONResponse(protocol.embedding_body(one.name, texts, found, in_base64))

    async def completions(self, request: Request) -> Response:
        body = await self._json(request)
        one = self._asked(body)
        asked = await asyncio.to_thread(protocol.read_completion, body, one.model, one.limits)
        return await self._answer(request, one, asked)

    async def chat(self, request: Request) -> Response:
        body = await self._json(request)
        one = self._asked(body)
        asked = await asyncio.to_thread(protocol.read_chat, body, one.model, one.limits, one.template)
        return await self._answer(request, one, asked)

    async def _answer(self, request: Request, one: Served, asked: protocol.CompletionRequest) -> Response:
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Any] = asyncio.Queue()
        jobs = [
            Completion(
                prompt,
                asked.options,
                asked.stops,
                i * asked.n,
                asked.logprobs or 0,
                self.settings.timeout,
                lambda x, i=i: _tell(loop, inbox, (i, x)),  # type: ignore[misc]
                echo=asked.echo,
                scored=asked.echo and asked.logprobs is not None,
            )
            for i, prompt in enumerate(asked.prompts)
        ]
        one.engine.submit(jobs)
        answer = protocol.Answer(one.name, asked)
        tokenizer = one.model.require_tokenizer()
        choices = [protocol.Choice(i, tokenizer, asked) for i in range(len(jobs) * asked.n)]
        if asked.stream:
            # A request that fails before its first token is still answered by a status.
            async with _attended(request, inbox, jobs):
                first = await _next(inbox)
                if isinstance(first[1], Error):
                    raise first[1]
            parts = self._stream(answer, choices, inbox, jobs, first)
            return StreamingResponse(
                parts, media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        parts_of: list[list[dict[str, Any]]] = [[] for _ in choices]
        left = len(jobs)
        async with _attended(request, inbox, jobs):
            while left:
                number, event = await _next(inbox)
                if isinstance(event, Error):
                    raise event
                for part in _parts(choices, number, asked.n, event):
                    parts_of[part["index"]].append(part)
                left -= _last(event)
        whole = [protocol.joined(parts) for parts in parts_of]
        return JSONResponse(answer.body(whole, answer.usage(choices)))

    async def _stream(
        self,
        answer: protocol.Answer,
        choices: list[protocol.Choice],
        inbox: asyncio.Queue[Any],
        jobs: list[Completion],
        first: tuple[int, Any],
    ) -> AsyncIterator[str]:
        """Server-sent events; a client that goes away ends its jobs."""
        left, (number, event) = len(jobs), first
        try:
            while True:
                if isinstance(event, Error):
                    yield _event(_refusal(event).body)
                    return
                for part in _parts(choices, number, answer.request.n, event):
                    yield _event(answer.body([part]))
                left -= _last(event)
                if not left:
                    break
                number, event = await inbox.get()
            if answer.request.usage:
                yield _event(answer.body([], answer.usage(choices)))
            yield "data: [DONE]\n\n"
        finally:
            _cancel(jobs)


def _parts(choices: list[protocol.Choice], number: int, n: int, event: Any) -> list[dict[str, Any]]:
    """The parts of answers that an event of completion ``number`` makes."""
    if isinstance(event, Echo):
        return [choices[number * n + i].echo(event.tokens) for i in range(n)]
    if isinstance(event[0], Token):
        parts = [choices[number * n + token.sequence].push(token) for token in event]
        return [part for part in parts if part is not None]
    return [choices[number * n + i].finish(reason) for i, reason in enumerate(event)]


def _last(event: Any) -> bool:
    """Whether a completion ends with an event: its finish reasons."""
    return not isinstance(event, Echo) and not isinstance(event[0], Token)


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "pyrformer"}


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _tell(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Any], event: Any) -> None:
    """Hands an event of the engine's thread to the loop."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(inbox.put_nowait, event)


def _cancel(jobs: list[Any]) -> None:
    for job in jobs:
        job.cancelled = True


@asynccontextmanager
async def _attended(request: Request, inbox: asyncio.Queue[Any], jobs: list[Any]) -> AsyncIterator[None]:
    """Watches the client: where it goes away, or something goes wrong inside, its jobs are cancelled."""

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        inbox.put_nowait(None)

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        _cancel(jobs)
        raise
    finally:
        watcher.cancel()


async def _next(inbox: asyncio.Queue[Any]) -> Any:
    event = await inbox.get()
    if event is None:
        raise ClientDisconnect
    return event


def _told(body: dict[str, Any], status: int, headers: Any = None) -> Response:
    """An error. It may quote half a surrogate pair, which only the escapes of JSON can say."""
    return Response(json.dumps(body), status, headers, media_type="application/json")


async def _on_refusal(_: Request, e: Exception) -> Response:
    if isinstance(e, _Body):
        return _told(e.body, e.status_code, e.headers)
    status, detail = getattr(e, "status_code", 500), getattr(e, "detail", str(e))
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _told(protocol.error_body(detail, kind), status)


async def _on_leave(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_fault(_: Request, __: Exception) -> Response:
    return _told(protocol.error_body("internal error", "server_error"), 500)
