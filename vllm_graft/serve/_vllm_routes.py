"""The server's routes for weight updates (vLLM internals, as `_vllm.py`).

vLLM's own routes for them come with its development mode only, next to others that run
arbitrary code, and outside the paths that ask for the API key. These lie under `/v1`.

Tested with vLLM 0.32 by `tests/contract`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from contextlib import suppress
from types import ModuleType
from typing import Any

from vllm_graft.train.targets import BACKEND, METHOD, ROUTE, first
from vllm_graft.weights.errors import WeightError

logger = logging.getLogger("vllm_graft")

PATIENCE_S = 60.0
"""How long a push may be silent before its sender counts as dead."""


def mount(routers: ModuleType) -> None:
    """Let the server take weights where it was started for that. Idempotent.

    Relies on `register_api_routers(args, app, ...)`, called once per server before the
    authentication is put around the application, up to 0.32.
    """
    patched: Any = routers
    stock = patched.register_api_routers
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def register_api_routers(args: Any, app: Any, *rest: Any, **more: Any) -> None:
        stock(args, app, *rest, **more)
        config = getattr(args, "weight_transfer_config", None)
        if _backend(config) == BACKEND:
            _attach(args, app)

    patched.register_api_routers = register_api_routers


def _backend(config: Any) -> str | None:
    backend = config.get("backend") if isinstance(config, dict) else config and config.backend
    return None if backend is None else str(backend)


def _attach(args: Any, app: Any) -> None:
    from fastapi import Request
    from fastapi.responses import JSONResponse

    if (args.api_server_count or 1) > 1 or args.data_parallel_size > 1:
        raise ValueError(
            "--weight-updates: one server process with one engine takes weights; leave "
            "--api-server-count and --data-parallel-size out"
        )
    updates = Updates(app.state)

    async def step(step: str, request: Request) -> Any:
        try:
            return await updates.take(step, _object(await request.body()))
        except WeightError as error:
            return JSONResponse({"error": str(error)}, status_code=409)

    # The annotations are strings here, and FastAPI would look for them in the module.
    step.__annotations__ = {"step": str, "request": Request}
    app.post(f"{ROUTE}/{{step}}")(step)
    app.add_middleware(_Gate, updates=updates)


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise WeightError("expected a JSON object")
    return value


class Updates:
    """Pushes to a server: what its requests see of them.

    During a push requests wait, and those in flight go on with the new weights, their keys and
    values computed anew. After one that broke off they are aborted, and new ones refused.
    """

    def __init__(self, state: Any) -> None:
        self.refusal: str | None = None
        """Why requests are refused, until a whole push has gone through."""
        self._state = state
        self._one_at_a_time = asyncio.Lock()
        self._alarm: asyncio.Task[None] | None = None

    async def take(self, step: str, info: dict[str, Any]) -> dict[str, Any]:
        """Let the engine take a step.

        Raises:
            WeightError: it was refused.
        """
        async with self._one_at_a_time:
            self._hush()
            engine = self._state.engine_client
            if step == "start":
                await engine.pause_generation(mode="keep", clear_cache=False)
            answers = await engine.collective_rpc(METHOD, args=(step, info))
            broken = [answer["error"] for answer in answers if answer.get("refuses")]
            if broken or step == "abandon":
                await self._broke_off(broken[0] if broken else str(info.get("reason")))
            answer = first(answers)
            if step == "finish":
                await engine.reset_prefix_cache(reset_running_requests=True)
                self.refusal = None
                await engine.resume_generation()
            elif step in ("start", "write"):
                self._alarm = asyncio.create_task(self._end_silence(info["push"]))
            return answer

    async def _broke_off(self, reason: str) -> None:
        self.refusal = reason
        logger.error("a push of weights broke off, requests are refused: %s", reason)
        engine = self._state.engine_client
        await engine.abort(list(engine.output_processor.request_states), internal=True)

    async def _end_silence(self, push: str) -> None:
        """Abandon the push unless its next step comes in time."""
        await asyncio.sleep(PATIENCE_S)
        self._alarm = None
        reason = f"nothing came from its sender for {PATIENCE_S:.0f} s"
        with suppress(WeightError):
            await self.take("abandon", {"push": push, "reason": reason})

    def _hush(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()


class _Gate:
    """ASGI middleware: no request reaches an engine whose weights may be a mixture."""

    def __init__(self, app: Any, updates: Updates) -> None:
        self._app = app
        self._updates = updates

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        reason = self._updates.refusal
        asks = scope["type"] == "http" and scope["method"] == "POST"
        if reason is None or not asks or ROUTE in scope["path"]:
            await self._app(scope, receive, send)
            return
        text = f"the engine refuses to serve: a push of weights broke off: {reason}"
        await JSONResponse({"error": {"message": text, "code": 503}}, 503)(scope, receive, send)
