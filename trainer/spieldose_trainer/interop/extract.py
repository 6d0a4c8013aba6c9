"""A delta from a full fine-tune: the largest of its changes, and how much of them that is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from spieldose_kernels.base import load_tokenizer
from spieldose_kernels.base_spec import fingerprint_checkpoint
from spieldose_kernels.checkpoint import find_checkpoint, read_config, target_shapes
from spieldose_kernels.delta import Adapter, AdapterInfo, SparseDelta
from spieldose_kernels.errors import BaseError
from spieldose_kernels.top_k import TopK
from spieldose_trainer import delta_path
from spieldose_trainer.errors import ConversionError
from spieldose_trainer.files import check_out
from spieldose_trainer.interop.checkpoint_tensors import BITS, CheckpointTensors
from spieldose_trainer.interop.config import Allocation, ExtractConfig
from spieldose_trainer.shared_name import shared_name

# of a configuration: what changes no logits
NOT_COMPUTED: Final = frozenset(
    "_name_or_path architectures dtype torch_dtype transformers_version use_cache".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extraction:
    """Hold a delta and what it leaves behind."""

    adapter: Adapter
    squares: Mapping[str, float]  # Σ ΔW² of the whole change, by module
    outside: Sequence[str]  # tensors that differ, too, and that no delta can carry
    settings: Sequence[str]  # of the model's configuration that differ: the base's will hold
    narrowed: tuple[str, str] | None  # dtypes, if the fine-tune's has fewer bits than the base's

    def kept(self, modules: Sequence[str]) -> float | None:
        """Return ‖Δ‖ / ‖ΔW‖ over these modules; None if nothing changed there."""
        whole = sum(self.squares[module] for module in modules)
        if whole == 0:
            return None
        values = [self.adapter.modules[m].values for m in modules if m in self.adapter.modules]
        return math.sqrt(sum(v.double().square().sum().item() for v in values) / whole)


def extract(config: ExtractConfig) -> Extraction:
    """Write a delta file of the largest W_finetuned − W_base of the target layers.

    Weights are read a tile at a time: memory holds a tile, the entries kept, and as many again in
    comparison. Values are float32. A chat template that the base has not goes along. Raises
    BaseError, ConfigError and ConversionError.
    """
    check_out(config.out, reads={"base": config.base, "finetuned": config.finetuned})
    directory, finetuned = find_checkpoint(config.base), find_checkpoint(config.finetuned)
    shapes = target_shapes(directory)
    base, tuned = CheckpointTensors(directory), CheckpointTensors(finetuned)
    for checkpoint in (base, tuned):
        checkpoint.check_weights(shapes)
    change = Change(base, tuned)
    modules = largest_changes(change, shapes, density=config.density, allocation=config.allocation)
    if not modules:
        raise ConversionError(
            f"expected {config.finetuned} to differ from {config.base} in its linear layers, "
            "got the same weights"
        )
    info = AdapterInfo(
        base_model=shared_name(config.base),
        base_fingerprint=fingerprint_checkpoint(directory),
        method="extract",
        density=sum(delta.nnz for delta in modules.values()) / sum(map(math.prod, shapes.values())),
        description=config.description,
        settings={
            "finetuned": shared_name(config.finetuned),
            "density": str(config.density),
            "allocation": config.allocation,
        },
        chat_template=_own_template(finetuned, directory),
    )
    adapter = Adapter(info, modules)
    settings = _differing_settings(directory, finetuned)
    delta_path.write(config.out, adapter)
    targets = {f"{module}.weight" for module in shapes}
    outside = differing(base, tuned, leave_out=targets)
    return Extraction(
        adapter=adapter,
        squares=change.squares,
        outside=outside,
        settings=settings,
        narrowed=_narrowed(base, tuned, sorted(targets)),
    )


class Change:
    """Read ΔW tile by tile, and keep each module's sum of squares."""

    def __init__(self, base: CheckpointTensors, tuned: CheckpointTensors) -> None:
        self._base = base
        self._tuned = tuned
        self.squares: dict[str, float] = {}

    def tiles(self, module: str) -> Iterator[torch.Tensor]:
        """Yield W_finetuned − W_base of a layer in order, flat float32."""
        name, squares = f"{module}.weight", 0.0
        for before, after in zip(self._base.tiles(name), self._tuned.tiles(name), strict=True):
            tile = after - before
            squares += tile.double().square().sum().item()
            if not math.isfinite(squares):
                raise ConversionError(f"{name}: expected finite weights, got NaN or infinity")
            yield tile
        self.squares[module] = squares


def largest_changes(
    change: Change,
    shapes: Mapping[str, tuple[int, int]],
    *,
    density: float,
    allocation: Allocation,
) -> dict[str, SparseDelta]:
    """Return the largest changes by module, at most `density` of each layer, or of all together.

    What did not change is no entry, a layer without entries not there.
    """
    groups = [[module] for module in shapes] if allocation == "layer" else [list(shapes)]
    modules: dict[str, SparseDelta] = {}
    with tqdm(total=len(shapes), unit="layer", disable=None, leave=False) as progress:
        for group in groups:
            sizes = [math.prod(shapes[module]) for module in group]
            top = TopK(max(1, int(density * sum(sizes))))
            first = 0
            for module in group:
                for tile in change.tiles(module):
                    top.show(tile, first=first)
                    first += tile.numel()
                progress.update()
            modules |= _split(*top.largest(), {module: shapes[module] for module in group})
    return modules


def _split(
    positions: torch.Tensor, values: torch.Tensor, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, SparseDelta]:
    """Cut entries of several layers laid end to end, positions ascending, into those of each."""
    positions, values = positions[values != 0], values[values != 0]
    modules, first = {}, 0
    for module, shape in shapes.items():
        bounds = torch.tensor([first, first + math.prod(shape)])
        start, end = torch.searchsorted(positions, bounds).tolist()
        if end > start:
            modules[module] = SparseDelta.from_flat(
                positions[start:end] - first, values[start:end], shape=shape
            )
        first += math.prod(shape)
    return modules


def differing(
    base: CheckpointTensors, tuned: CheckpointTensors, *, leave_out: set[str]
) -> list[str]:
    """Name the tensors that are not the same in both checkpoints, or in one alone."""
    names = sorted((base.shapes.keys() | tuned.shapes.keys()) - leave_out)
    return [name for name in names if not _same(base, tuned, name)]


def _same(base: CheckpointTensors, tuned: CheckpointTensors, name: str) -> bool:
    if base.shapes.get(name) != tuned.shapes.get(name):
        return False
    return all(map(torch.equal, base.tiles(name), tuned.tiles(name)))


def _differing_settings(base: Path, finetuned: Path) -> list[str]:
    """Name what a model's configuration says differently of how it computes, if it has one."""
    try:
        before, after = (read_config(path).to_dict() for path in (base, finetuned))
    except BaseError:  # a fine-tune may have been saved as weights alone
        return []
    names = sorted((before.keys() | after.keys()) - NOT_COMPUTED)
    return [name for name in names if before.get(name) != after.get(name)]


def _narrowed(
    base: CheckpointTensors, tuned: CheckpointTensors, names: Sequence[str]
) -> tuple[str, str] | None:
    for name in names:
        before, after = base.dtypes[name], tuned.dtypes[name]
        if BITS[after] < BITS[before]:
            return before, after
    return None


def _own_template(finetuned: Path, base: Path) -> str:
    """Return a fine-tune's chat template, "" if it has none or the base's."""
    tuned, before = _template(finetuned), _template(base)
    return tuned if tuned != before else ""


def _template(directory: Path) -> str:
    try:
        template = load_tokenizer(directory).chat_template
    except BaseError:  # a fine-tune may have been saved without its tokenizer
        return ""
    return template if isinstance(template, str) else ""
