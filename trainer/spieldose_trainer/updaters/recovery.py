"""Adam's step for chunks whose moments are known by their projections only."""

import torch

from spieldose_kernels.support_product import TILE
from spieldose_trainer.updaters.sketch import Sketch

ROUNDING = 2e-6  # of a chunk's root mean square gradient: what float32 leaves of a moment of 0


def recover_step(
    p: torch.Tensor,
    q: torch.Tensor,
    sketch: Sketch,
    *,
    count: int,
    updates: int,
    betas: tuple[float, float],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions within each chunk and m̂/(√v̂ + ε) there, [n, count], from p and q [n, k].

    p and q are the projected moments after `updates` updates. Matching pursuit finds the positions
    and m in p; v is solved from q at the same positions. Once more than `count` positions of a
    chunk have a moment neither is exact, and v may come out near zero or negative: it is raised to
    the least that a second moment can be beside this m. Raised to zero alone, 2 % of the steps of
    update 7 on SmolLM2-135M came out 2,000 times the learning rate, and the loss grew. A chunk of
    fewer moments has rounding alone at the other positions, where m and v are noise of one kind and
    their quotient is of any size: no step is made there.
    """
    first, second = 1 - betas[0] ** updates, 1 - betas[1] ** updates
    ratio = largest_ratio(betas, updates)
    positions, steps = [], []
    block = max(1, TILE // sketch.matrix.shape[1])
    for p_block, q_block in zip(p.split(block), q.split(block), strict=True):
        support = sketch.find(p_block, count=count)
        m = support.solve(p_block) / first
        v = torch.maximum(support.solve(q_block) / second, m.square() / ratio)
        rounding = ROUNDING * (q_block.norm(dim=1, keepdim=True) / second).sqrt()
        positions.append(support.positions)
        steps.append((m / (v.sqrt() + eps)).where(m.abs() > rounding, 0.0))
    return torch.cat(positions), torch.cat(steps)


def largest_ratio(betas: tuple[float, float], updates: int) -> float:
    """Return the largest m̂²/v̂ any gradients can give Adam, by Cauchy–Schwarz over their sums.

    For the usual betas 1 after the first update, 53 after many: no step exceeds 7.3 learning rates.
    """
    beta1, beta2 = betas
    ratio = beta1**2 / beta2
    plain = (1 - beta1) ** 2 / (1 - beta2) * (1 - ratio**updates) / (1 - ratio)
    return plain * (1 - beta2**updates) / (1 - beta1**updates) ** 2
