"""Where weights are pushed to: an `LLM` of this process, or a server by its URL."""

from __future__ import annotations

import json
import os
from http.client import HTTPException
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from vllm_graft.weights.errors import WeightError

BACKEND = "graft_shm"
"""The `backend` of vLLM's `weight_transfer_config`: shared memory of one host."""

METHOD = "graft_push"
"""The method of a worker that takes the steps."""

ROUTE = "/v1/graft/weights"
"""Under `/v1`, where vLLM's server asks for its API key."""


class Target(Protocol):
    """An engine that takes the steps of a push, see `serve.receiving`."""

    def call(self, step: str, info: dict[str, Any]) -> dict[str, Any]:
        """Take a step on all ranks of the engine.

        Raises:
            WeightError: the engine refused it.
            OSError: no answer.
        """


def target_of(target: Any, api_key: str | None) -> Target:
    """The target for what the user named.

    Raises:
        TypeError: neither a URL nor an `LLM`.
    """
    if isinstance(target, str):
        return Server(target, api_key or os.environ.get("VLLM_API_KEY"))
    if hasattr(target, "collective_rpc") and hasattr(target, "llm_engine"):
        return Engine(target)
    raise TypeError(
        f"push_weights: target is a {type(target).__name__}; expected a vllm.LLM, a TrainableLLM, "
        "or the URL of a server such as 'http://127.0.0.1:8000'"
    )


class Engine:
    """A `vllm.LLM`, with its engine core and workers in this process or in others."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        parallel = llm.llm_engine.vllm_config.parallel_config
        if parallel.distributed_executor_backend == "external_launcher" and parallel.world_size > 1:
            raise WeightError(
                f"the engine has {parallel.world_size} ranks under torchrun, and each LLM reaches "
                "one of them; train its live module in place, or push to a server"
            )

    def call(self, step: str, info: dict[str, Any]) -> dict[str, Any]:
        """See `Target`; while the weights are not whole, new requests raise."""
        from vllm_graft.serve import _vllm_engine

        engine = self._llm.llm_engine
        if step == "start":
            self._check_idle()
            _vllm_engine.refuse_requests(engine, "a push of weights is not complete")
        try:
            answer = first(self._llm.collective_rpc(METHOD, args=(step, info)))
        except WeightError as error:
            if step != "describe":
                _vllm_engine.refuse_requests(engine, str(error))
            raise
        if step == "abandon":
            _vllm_engine.refuse_requests(engine, info["reason"])
        if step == "finish":
            self._llm.reset_prefix_cache()
            _vllm_engine.accept_requests(engine)
        return answer

    def _check_idle(self) -> None:
        engine = self._llm.llm_engine
        if engine.has_unfinished_requests():
            raise WeightError(
                f"{engine.get_num_unfinished_requests()} requests are in flight; finish or abort "
                "them before the push"
            )


class Server:
    """A server that was started with `vllm-graft serve --weight-updates`."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + ROUTE
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def call(self, step: str, info: dict[str, Any]) -> dict[str, Any]:
        """See `Target`."""
        body = json.dumps(info).encode()
        request = Request(f"{self._url}/{step}", body, self._headers)  # noqa: S310 - the user's URL
        try:
            with urlopen(request) as response:  # noqa: S310
                answer: dict[str, Any] = json.load(response)
                return answer
        except HTTPError as error:
            raise WeightError(self._reason(error)) from None
        except (URLError, HTTPException) as error:
            raise ConnectionError(f"{self._url}: {error}") from error

    def _reason(self, error: HTTPError) -> str:
        if error.code == 401:
            return f"{self._url}: the server wants its API key; pass api_key or set VLLM_API_KEY"
        if error.code == 404:
            return (
                f"{self._url}: the server takes no weights; start it with "
                "`vllm-graft serve ... --weight-updates`"
            )
        said = error.read().decode(errors="replace")
        try:
            return str(json.loads(said)["error"])
        except (ValueError, KeyError, TypeError):
            return f"{self._url}: HTTP {error.code}: {said[:500]}"


def first(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer of the ranks.

    Raises:
        WeightError: with the reason of the first rank that refused.
    """
    for rank, answer in enumerate(answers):
        if "error" in answer:
            where = f"rank {rank}: " if len(answers) > 1 else ""
            raise WeightError(where + answer["error"])
    return answers[0]
