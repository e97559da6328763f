"""An optimizer for served weights in low precision. Torch only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from vllm_graft.weights.shards import local

Rounding = Literal["master", "stochastic"]


class ServedOptimizer(Optimizer):
    """Any torch optimizer, computing in float32 on parameters of lower precision.

    A bf16 parameter has 8 bits of mantissa: at small learning rates most updates round to
    nothing. Two ways out:

    * `rounding="master"`: float32 masters beside the parameters; each step rounds them into
      the served tensors, in place. 4 bytes per parameter more.
    * `rounding="stochastic"`: no masters; each update is rounded up or down at random, by how
      near it is, so that the mean is right.

    Values that something else writes into a parameter, by any route (a checkpoint, a push,
    `.data`), replace its master at the next step: before it, masters are rounded and compared
    with what is served, one pass over the parameters. Values that are equal keep their master.
    float32 parameters are optimized as they are.

    Args:
        params: parameters or param groups, as for any optimizer.
        optimizer: its class, `torch.optim.AdamW` for example.
        rounding: one of the two above.
        **options: for `optimizer`.

    Raises:
        ValueError: another `rounding`.

    Example::

        optimizer = ServedOptimizer(llm.model.parameters(), torch.optim.AdamW, lr=1e-6)
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
        *,
        rounding: Rounding = "master",
        **options: Any,
    ) -> None:
        if rounding not in ("master", "stochastic"):
            raise ValueError(f"rounding={rounding!r}; use 'master' or 'stochastic'")
        self._rounding = rounding
        groups = _as_groups(params)
        self._served: list[torch.nn.Parameter] = [p for g in groups for p in g["params"]]
        self._masters = [_master(p, rounding) for p in self._served]
        masters = iter(self._masters)
        self.inner: Optimizer = optimizer(
            [{**group, "params": [next(masters) for _ in group["params"]]} for group in groups],
            **options,
        )
        settings = [_settings(group) for group in self.inner.param_groups]
        super().__init__(
            [{**g, "params": o["params"]} for g, o in zip(settings, groups, strict=True)],
            self.inner.defaults,
        )
        self._empty_masters()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is built; give all parameters to its constructor.

        Raises:
            NotImplementedError: called later.
        """
        if len(self.param_groups) >= len(self.inner.param_groups):
            raise NotImplementedError(
                "ServedOptimizer takes all parameters when it is built; build a new one"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the optimizer, rounded into the served parameters in place."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_settings(outer))  # a learning-rate scheduler wrote into the outer one
        self._read_served()
        self.inner.step()
        self._write_served()
        self._empty_masters()
        return loss

    def _read_served(self) -> None:
        for served, master in self._apart():
            if self._rounding == "stochastic":
                master.data = served.detach().float()
            else:
                _take_up_written(local(served), local(master))
            master.grad = None if served.grad is None else served.grad.float()

    def _write_served(self) -> None:
        for served, master in self._apart():
            if master.grad is not None and self._rounding == "stochastic":
                served.copy_(round_stochastically(master, served.dtype))
            elif master.grad is not None:
                served.copy_(master)
            master.grad = None

    def _empty_masters(self) -> None:
        if self._rounding == "stochastic":
            for _, master in self._apart():
                master.data = master.data.new_empty(0)

    def _apart(self) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Parameters that have a master, with it."""
        pairs = zip(self._served, self._masters, strict=True)
        return [(served, master) for served, master in pairs if master is not served]

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and the masters where there are any."""
        kept = self._apart() if self._rounding == "master" else []
        return {"inner": self.inner.state_dict(), "masters": [m.detach() for _, m in kept]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave; masters go into the served parameters, rounded.

        Raises:
            ValueError: another number of masters than this optimizer has.
        """
        kept = self._apart() if self._rounding == "master" else []
        masters = state_dict["masters"]
        if len(masters) != len(kept):
            raise ValueError(
                f"the state has {len(masters)} masters, this optimizer {len(kept)}: it was saved "
                "with another rounding, dtype or set of parameters"
            )
        self.inner.load_state_dict(state_dict["inner"])
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer.update(_settings(inner))
        for (served, master), value in zip(kept, masters, strict=True):
            master.copy_(value)
            served.copy_(master)


def _take_up_written(served: torch.Tensor, master: torch.Tensor) -> None:
    """Put values that are not the rounded master's into the master.

    Values are compared, not versions: `.data` and vLLM's reload leave no version.
    """
    written = master.to(served.dtype) != served
    master.copy_(torch.where(written, served, master))


def round_stochastically(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 `values` in bfloat16, up with a probability that makes the mean right."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint_like(bits, 1 << 16)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(dtype)


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    listed = list(params)
    groups = listed if listed and isinstance(listed[0], dict) else [{"params": listed}]
    return [{**group, "params": list(group["params"])} for group in groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _master(served: torch.nn.Parameter, rounding: Rounding) -> torch.Tensor:
    """What the inner optimizer holds in place of `served`."""
    if served.dtype == torch.float32:
        return served
    if rounding == "stochastic" and served.dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 parameters, got {served.dtype}")
    return served.detach().float()
