"""SGC written down plainly: explicit A, one chunk at a time, full matrices, float64."""

from typing import Any

import numpy as np
import torch

from spieldose_trainer.updaters.compression import Compression


class DenseRun:
    """Follow a toy run under CompressedAdam and LargestDeltas without any of their code."""

    def __init__(self, toy: Any, compression: Compression) -> None:
        self.toy = toy
        self.compression = compression
        self.matrix = toy.updater.sketch.matrix.double().numpy()  # A; everything else is our own
        self.deltas = {
            name: toy.dense(name, layer.values).double().numpy()
            for name, layer in toy.layers.items()
        }
        self.support = {
            name: toy.dense(name, torch.ones_like(layer.values)).bool().numpy()
            for name, layer in toy.layers.items()
        }
        self.p: dict[str, Any] = {}
        self.q: dict[str, Any] = {}
        self.projection: dict[str, Any] = {}
        self.age = dict.fromkeys(toy.shapes, 0)
        self.clamped = 0  # second moments that had to be raised
        self.evicted = 0.0  # squared norm, of the latest update

    def update(self, number: int) -> None:
        """Make one whole update."""
        passes = [self.gradients(x, target) for x, target in self.toy.batches(number)]
        self.evicted = 0.0
        for name in self.deltas:
            step = self.step(name, [gradient[name] for gradient in passes])
            self.keep_largest(name, step)

    def gradients(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, Any]:
        """Return the dense dW of one forward pass."""
        deltas = {
            name: torch.tensor(delta, requires_grad=True) for name, delta in self.deltas.items()
        }

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.toy.weights[name] + deltas[name]).t()

        loss = self.toy.loss(product, x, target)
        found = torch.autograd.grad(loss, list(deltas.values()))
        return {name: g.numpy() for name, g in zip(deltas, found, strict=True)}

    def step(self, name: str, passes: list[Any]) -> Any:
        """Return how the layer's weights are to move, [R, C]."""
        rank = self.compression.rank
        if rank is None:
            return self.compressed_step(name, sum(passes))
        on_rows = passes[0].shape[0] <= passes[0].shape[1]
        if self.age[name] in (0, self.compression.refresh):
            self.age[name] = 0
            left, _, right = np.linalg.svd(passes[0])
            vectors = left[:, :rank] if on_rows else right[:rank].T
            self.projection[name] = self.with_their_signs(name, vectors)
        vectors = self.projection[name]
        if on_rows:
            return vectors @ self.compressed_step(name, vectors.T @ sum(passes))
        return self.compressed_step(name, sum(passes) @ vectors) @ vectors.T

    def with_their_signs(self, name: str, vectors: Any) -> Any:
        """Singular vectors are unique but for their sign: take the signs of the run under test."""
        state = self.toy.updater.state[self.toy.layers[name].values]
        return vectors * np.sign((state["projection"].double().numpy() * vectors).sum(0))

    def compressed_step(self, name: str, gradient: Any) -> Any:
        """Return the step of a gradient of any shape, chunk by chunk."""
        chunk, group = self.compression.chunk, self.toy.updater.param_groups[0]
        beta1, beta2 = group["betas"]
        flat = np.pad(gradient.flatten(), (0, -gradient.size % chunk)).reshape(-1, chunk)
        if self.age[name] == 0:
            self.p[name], self.q[name] = np.zeros((2, len(flat), self.matrix.shape[0]))
        self.age[name] += 1
        age, change = self.age[name], np.zeros_like(flat)
        for number, whole in enumerate(flat):
            largest = np.zeros(chunk)
            top = np.argsort(-np.abs(whole))[: self.compression.kept]
            largest[top] = whole[top]
            p, q = self.p[name][number], self.q[name][number]
            p[:] = beta1 * p + (1 - beta1) * self.matrix @ largest
            q[:] = beta2 * q + (1 - beta2) * self.matrix @ largest**2
            support = self.pursue(p)
            m = np.linalg.lstsq(self.matrix[:, support], p)[0] / (1 - beta1**age)
            v = np.linalg.lstsq(self.matrix[:, support], q)[0] / (1 - beta2**age)
            least = m**2 / largest_ratio(beta1, beta2, age)
            self.clamped += int((v < 0.999 * least).sum())
            v = np.maximum(v, least)
            change[number, support] = -group["lr"] * m / (np.sqrt(v) + group["eps"])
        return change.flatten()[: gradient.size].reshape(gradient.shape)

    def pursue(self, p: Any) -> list[int]:
        """Return the support orthogonal matching pursuit finds."""
        support: list[int] = []
        rest = p
        for _ in range(self.compression.kept):
            correlation = np.abs(self.matrix.T @ rest)
            correlation[support] = -1
            support.append(int(correlation.argmax()))
            columns = self.matrix[:, support]
            rest = p - columns @ np.linalg.lstsq(columns, p)[0]
        return support

    def keep_largest(self, name: str, step: Any) -> None:
        """Add a step and keep as many deltas as the support has room for."""
        group, count = self.toy.updater.param_groups[0], int(self.support[name].sum())
        moved = self.deltas[name] * (1 - group["lr"] * group["weight_decay"]) + step
        order = np.argsort(-np.abs(moved), axis=None)
        self.support[name] = np.zeros(moved.size, dtype=bool)
        self.support[name][order[:count]] = True
        self.support[name] = self.support[name].reshape(moved.shape)
        self.deltas[name] = np.where(self.support[name], moved, 0)
        self.evicted += float((moved[~self.support[name]] ** 2).sum())


def largest_ratio(beta1: float, beta2: float, age: int) -> float:
    """Return the largest m̂²/v̂: the value at gradients in proportion to (beta1/beta2)^i."""
    gradients = (beta1 / beta2) ** np.arange(age)
    m = ((1 - beta1) * beta1 ** np.arange(age) * gradients).sum() / (1 - beta1**age)
    v = ((1 - beta2) * beta2 ** np.arange(age) * gradients**2).sum() / (1 - beta2**age)
    return float(m**2 / v)
