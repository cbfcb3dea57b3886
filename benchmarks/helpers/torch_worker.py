"""PyTorch's side of the comparison: a process that builds problems and times one call of each when asked.

It runs alone, with any interpreter that has PyTorch, reads a JSON object a line and answers with one: {"layer": ...},
{"linear": ...} or {"step": ...} build a candidate under a name, {"time": name} makes one call and answers with its
seconds. So that its threads and XLA's never work at the same time, and the caller can interleave both.

meProp is written from the description in its paper (Sun et al., 2017): "simple" keeps the k largest entries of each
example's gradient, "unified" the k columns with the largest sum of absolute values over the batch.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def unified(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx, dw) of y = x wᵀ, w [out, in], from the k columns of g: gather, and two small dense products."""
    index = g.abs().sum(0).topk(k, sorted=False).indices
    kept = g.index_select(1, index)
    dx = kept @ w.index_select(0, index)
    dw = torch.zeros_like(w)
    dw.index_copy_(0, index, kept.t() @ x)
    return dx, dw


def simple(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx, dw) from the k largest entries of each row of g: masked, and two dense products."""
    index = g.abs().topk(k, dim=1, sorted=False).indices
    p = torch.zeros_like(g).scatter_(1, index, g.gather(1, index))
    return p @ w, p.t() @ x


def dense(g: torch.Tensor, x: torch.Tensor, w: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dx, dw) of y = x wᵀ."""
    return g @ w, g.t() @ x


METHODS = {"dense": dense, "meProp unified": unified, "meProp simple": simple}


class SparseLinear(torch.autograd.Function):
    """y = x wᵀ + b with one of the backwards above; the bias has its dense gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, b: Any, k: int, method: str) -> torch.Tensor:
        """Return y."""
        ctx.save_for_backward(x, w)
        ctx.k, ctx.method = k, method
        return torch.addmm(b, x, w.t())

    @staticmethod
    def backward(ctx: Any, g: Any) -> tuple[Any, ...]:
        """Return the gradients."""
        x, w = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:  # the first layer
            index = g.abs().sum(0).topk(ctx.k, sorted=False).indices
            if ctx.method == "meProp unified":
                dw = torch.zeros_like(w)
                dw.index_copy_(0, index, g.index_select(1, index).t() @ x)
            else:
                index = g.abs().topk(ctx.k, dim=1, sorted=False).indices
                dw = torch.zeros_like(g).scatter_(1, index, g.gather(1, index)).t() @ x
            return None, dw, g.sum(0), None, None
        dx, dw = METHODS[ctx.method](g, x, w, ctx.k)
        return dx, dw, g.sum(0), None, None


class Linear(nn.Linear):
    """A linear layer with a sparse backward."""

    def __init__(self, inputs: int, outputs: int, k: int, method: str) -> None:
        """Keep k of the outputs."""
        super().__init__(inputs, outputs)
        self.k, self.method = k, method

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y."""
        return SparseLinear.apply(x, self.weight, self.bias, self.k, self.method)


def layer(rows: int, m: int, n: int, density: float, method: str) -> Callable[[], object]:
    """Return a call of one layer's backward: selection and both products."""
    torch.manual_seed(0)
    x, w, g = torch.randn(rows, m), torch.randn(n, m) / m**0.5, torch.randn(rows, n)
    k, function = max(1, round(density * n)), METHODS[method]

    def call() -> object:
        with torch.no_grad():
            return function(g, x, w, k)

    return call


def linear(rows: int, m: int, n: int, density: float, library: str) -> Callable[[], object]:
    """Return a call of a linear layer's forward and backward: of PyTorch, or of SparseProp with entries anywhere."""
    torch.manual_seed(0)
    w = torch.randn(n, m) * (torch.rand(n, m) < density) / m**0.5
    if library == "sparseprop":
        from sparseprop.modules import SparseLinear as WithEntries

        module: nn.Module = WithEntries(w)
    else:
        module = nn.Linear(m, n, bias=False)
        module.weight.data.copy_(w)
    x, g = torch.randn(rows, m, requires_grad=True), torch.randn(rows, n)

    def call() -> object:
        x.grad = None
        module.zero_grad(set_to_none=True)
        module(x).backward(g)
        return x.grad

    return call


def peers() -> dict[str, str]:
    """Return, for each library beside PyTorch, why it cannot be asked; nothing where it can."""
    try:
        importlib.import_module("sparseprop.modules")
    except Exception as error:
        return {"sparseprop": f"SparseProp did not start: {error}. Build it from github.com/IST-DASLab/sparseprop."}
    return {}


def step(width: int, depth: int, batch: int, density: float, method: str, optimizer: str) -> Callable[[], object]:
    """Return a call of one training step of an MLP with `depth` linear layers, 784 inputs and ten classes."""
    torch.manual_seed(0)
    k = max(1, round(density * width))
    layers: list[nn.Module] = []
    inputs = 784
    for _ in range(depth - 1):
        layers += [nn.Linear(inputs, width) if method == "dense" else Linear(inputs, width, k, method), nn.ReLU()]
        inputs = width
    model = nn.Sequential(*layers, nn.Linear(inputs, 10))
    rule = {"SGD": lambda p: torch.optim.SGD(p, 0.01), "Adam": lambda p: torch.optim.Adam(p, 1e-3)}[optimizer]
    tx = rule(model.parameters())
    x, y = torch.randn(batch, 784), torch.randint(0, 10, (batch,))

    def call() -> object:
        tx.zero_grad(set_to_none=True)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        tx.step()
        return loss

    return call


def main() -> None:
    """Answer until the input ends."""
    calls: dict[str, Callable[[], object]] = {}
    hello = {"version": torch.__version__, "threads": torch.get_num_threads(), "missing": peers()}
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "time" in request:
            start = time.perf_counter()
            calls[request["time"]]()
            answer: dict[str, object] = {"seconds": time.perf_counter() - start}
        elif "forget" in request:
            calls.clear()
            answer = {}
        else:
            name = request.pop("name")
            kind, arguments = request.popitem()
            makers: dict[str, Callable[..., Callable[[], object]]] = {"layer": layer, "linear": linear, "step": step}
            calls[name] = makers[kind](**arguments)
            answer = {}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
