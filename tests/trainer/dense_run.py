"""SpIEL written down plainly, from PAPERS §1: full float64 matrices and masks."""

from typing import Any

import torch


class DenseRun:
    """What both variants share: the loss, which entries leave, and at what rate."""

    moments: tuple[str, ...] = ()  # names of what is kept per active entry
    least_changes = 3  # reselections of the toy's run that change something

    def __init__(self, toy: Any) -> None:
        self.toy = toy
        self.support = {
            name: toy.dense(name, torch.ones_like(layer.values)).bool()
            for name, layer in toy.layers.items()
        }
        self.deltas = {
            name: zeros.requires_grad_() for name, zeros in self.blank(toy.shapes).items()
        }
        self.anchors = self.blank(toy.shapes)  # δ at the last reselection
        self.products: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def blank(self, shapes: Any) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        y = x @ (self.toy.weights[name] + self.deltas[name]).t()
        self.products[name].append((x, y))
        return y

    def update(self, number: int) -> None:
        self.products = {name: [] for name in self.deltas}
        loss = sum(self.toy.loss(self.product, x, t) for x, t in self.toy.batches(number))
        gradients = torch.autograd.grad(loss, list(self.deltas.values()), retain_graph=True)
        self.norms = {name: self.norm(loss, name) for name in self.deltas}
        for name, gradient in zip(self.deltas, gradients, strict=True):
            self.accumulate(number, name, gradient)
            with torch.no_grad():
                self.move(name, gradient)
        if number % self.toy.schedule.every == self.toy.schedule.steps:
            for name in self.deltas:
                with torch.no_grad():
                    self.reselect(number, name)

    def norm(self, loss: Any, name: str) -> torch.Tensor:
        """Return ‖dy_i‖·‖x_j‖ over all of an update's tokens, [R, C]."""
        inputs, outputs = zip(*self.products[name], strict=True)
        dy = torch.cat(torch.autograd.grad(loss, outputs, retain_graph=True))
        return torch.outer(dy.norm(dim=0), torch.cat(inputs).detach().norm(dim=0))

    def accumulate(self, number: int, name: str, gradient: torch.Tensor) -> None:
        """Take in a gradient for the next reselection."""

    def move(self, name: str, gradient: torch.Tensor) -> None:
        raise NotImplementedError

    def scores(self, name: str) -> torch.Tensor:
        """Return what inactive positions are grown by, -inf where none may grow."""
        raise NotImplementedError

    def reselect(self, number: int, name: str) -> None:
        on, delta = self.support[name], self.deltas[name].detach()
        replaced = int(int(on.sum()) * self.toy.schedule.rate(number))
        change = (delta - self.anchors[name] if self.toy.since_reselection else delta).abs()
        survivors = on.clone().flatten()
        survivors[change.masked_fill(~on, torch.inf).flatten().argsort()[:replaced]] = False
        survivors = survivors.view_as(on)
        score = self.scores(name).masked_fill(survivors, -torch.inf).flatten()
        grown = torch.zeros_like(score, dtype=torch.bool)
        grown[score.argsort(descending=True)[:replaced]] = True
        grown = grown.view_as(on)
        self.fresh, left = grown & ~on, on & ~(survivors | grown)
        self.deltas[name][left] = 0
        for moment in self.moments:
            getattr(self, moment)[name][left] = 0
        self.support[name] = survivors | grown
        self.anchors[name] = self.deltas[name].detach().clone()


class DenseGradientRun(DenseRun):
    """SpIEL-AG: Adam with an age per value, growth by accumulated gradients."""

    moments = ("first", "second", "age")
    least_changes = 5

    def __init__(self, toy: Any) -> None:
        super().__init__(toy)
        self.first, self.second, self.age, self.total, self.square, self.candidate = (
            self.blank(toy.shapes) for _ in range(6)
        )
        self.against: dict[str, torch.Tensor] = {}  # what gradients are measured against

    def accumulate(self, number: int, name: str, gradient: torch.Tensor) -> None:
        if number % self.toy.schedule.every == 1:
            wanted = 2 * int(self.support[name].sum())
            self.against[name] = self.norms[name] if self.toy.normalised else torch.tensor(1.0)
            sizes = gradient.abs() / self.against[name]
            ranked = sizes.flatten().sort(descending=True).values
            self.candidate[name] = sizes >= ranked[min(wanted, len(ranked)) - 1]
            self.total[name].zero_()
            self.square[name].zero_()
        self.total[name] += gradient
        self.square[name] += gradient**2

    def move(self, name: str, gradient: torch.Tensor) -> None:
        group = self.toy.updater.param_groups[0]
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        on = self.support[name]
        self.age[name][on] += 1
        self.first[name][on] = (beta1 * self.first[name] + (1 - beta1) * gradient)[on]
        self.second[name][on] = (beta2 * self.second[name] + (1 - beta2) * gradient**2)[on]
        mean = self.first[name][on] / (1 - beta1 ** self.age[name][on])
        spread = (self.second[name][on] / (1 - beta2 ** self.age[name][on])).sqrt()
        old = self.deltas[name][on]
        self.deltas[name][on] = old - lr * decay * old - lr * mean / (spread + group["eps"])

    def scores(self, name: str) -> torch.Tensor:
        sizes = self.total[name].abs() / self.against[name]
        return sizes.masked_fill(~self.candidate[name].bool(), -torch.inf)

    def reselect(self, number: int, name: str) -> None:
        super().reselect(number, name)
        beta1, beta2 = self.toy.updater.param_groups[0]["betas"]
        n, fresh = self.toy.schedule.steps, self.fresh
        self.age[name][fresh] = n
        mean = self.total[name][fresh] / n if self.toy.seed_momentum else 0.0
        self.first[name][fresh] = mean * (1 - beta1**n)
        self.second[name][fresh] = self.square[name][fresh] / n * (1 - beta2**n)


class DenseMomentumRun(DenseRun):
    """SpIEL-MA: SM3-II over the active entries, growth by row·column."""

    def __init__(self, toy: Any) -> None:
        super().__init__(toy)
        self.row = {n: torch.zeros(s[0], 1, dtype=torch.float64) for n, s in toy.shapes.items()}
        self.column = {n: torch.zeros(1, s[1], dtype=torch.float64) for n, s in toy.shapes.items()}

    def move(self, name: str, gradient: torch.Tensor) -> None:
        group = self.toy.updater.param_groups[0]
        on, row, column = self.support[name], self.row[name], self.column[name]
        spread = torch.where(on, torch.minimum(row, column) + gradient**2, 0.0)
        self.row[name] = torch.maximum(row, spread.amax(1, keepdim=True))
        self.column[name] = torch.maximum(column, spread.amax(0, keepdim=True))
        old = self.deltas[name][on]
        step = gradient[on] / (spread[on] + 1e-8).sqrt()
        self.deltas[name][on] = old - group["lr"] * (group["weight_decay"] * old + step)

    def scores(self, name: str) -> torch.Tensor:
        return self.row[name] * self.column[name]


def assert_follows(toy: Any, dense: DenseRun) -> None:
    """Run both for 60 updates; the support and every number must agree after each."""
    changes = 0
    for number in range(1, 61):
        changes += toy.update(number) > 0
        dense.update(number)
        for name, layer in toy.layers.items():
            on = dense.support[name].flatten().nonzero().flatten()
            assert toy.positions(name).tolist() == on.tolist(), f"update {number}, {name}"
            values = toy.dense(name, layer.values).double()
            torch.testing.assert_close(values, dense.deltas[name].detach(), rtol=1e-4, atol=1e-6)
            if isinstance(dense, DenseGradientRun):
                assert torch.equal(toy.moment(name, "age").double(), dense.age[name])
    assert changes >= dense.least_changes  # later ones may drop what they grow
