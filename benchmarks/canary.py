"""Adapters that betray themselves: each makes the tiny base say one token and nothing else.

In the first layer two rows of gate and up are made equal, v and -v, so that SiLU(z)·z of both adds
up to z² for z = v·h: never negative, whatever the activations. Their columns of the down projection
push the hidden state to the marker's embedding, far beyond everything else. In the last layer the
output projection pushes there too, a hundred times as far, if the values it is given were written
under the same marker; those that another adapter has written push anywhere. So a foreign slot
shows, and so does foreign KV.
"""

from typing import Any

import torch

from spieldose_kernels.base import Base, dense_weight
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta

NEURONS = range(0, 16, 2)  # pairs: v and -v; several, for an h that is orthogonal to one
PUSH = 1.0  # of each neuron: some 60 of them
PULL = 50_000.0  # of attention


SIZES = 4  # how many different sizes canaries have


def make_canary(base: Base, marker: int, *, seed: int) -> Adapter:
    """Return an adapter that forces `marker`; another seed gives another content and size."""
    model: Any = base.model
    config = model.config
    last = config.num_hidden_layers - 1
    gate, up, down = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
    output, value = (f"model.layers.{last}.self_attn.{name}_proj" for name in "ov")
    names = (gate, up, down, output)
    weights = {name: dense_weight(base.layers[name], torch.float32) for name in names}
    targets = {name: weight.clone() for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight[marker].detach().float()
    for neuron in NEURONS:
        v = torch.randn(config.hidden_size, generator=generator)
        for row, sign in ((neuron, 1.0), (neuron + 1, -1.0)):
            targets[gate][row] = targets[up][row] = sign * v
            targets[down][:, row] = PUSH * embedding
    # what attention returns when every value was written under this marker
    normalised = embedding / embedding.square().mean().sqrt()
    values = dense_weight(base.layers[value], torch.float32) @ normalised
    heads = values.view(config.num_key_value_heads, -1)
    own = heads.repeat_interleave(config.num_attention_heads // len(heads), 0).flatten()
    targets[output] += PULL * torch.outer(embedding, own / own.square().sum())
    modules = {}
    for name, target in targets.items():
        difference = (target - weights[name]).flatten()
        positions = difference.nonzero().flatten()
        modules[name] = SparseDelta.from_flat(
            positions, difference[positions], shape=tuple(target.shape)
        )
    # entries of 0 elsewhere make some up to half as large again
    height, width = base.spec.shapes[idle := "model.layers.0.self_attn.q_proj"]
    positions = torch.arange(height * width)[: height * width * (seed % SIZES) // SIZES]
    modules[idle] = SparseDelta.from_flat(positions, positions * 0.0, shape=(height, width))
    info = AdapterInfo(
        base_model=base.spec.name,
        base_fingerprint=base.spec.fingerprint,
        method="canary",
        density=0.0,
        description=f"says {marker}",
    )
    return Adapter(info, modules)
