"""A plan as tables on a terminal."""

from rich.console import Console
from rich.table import Table

from spieldose_trainer.memory import readable
from spieldose_trainer.plan import Plan


def print_plan(plan: Plan, console: Console) -> None:
    """Print what would be trained, and what that would need."""
    console.print(_kinds(plan))
    if plan.allocation == "global":
        console.print("With --allocation global the run finds each layer's share of the total.")
    console.print(_memory(plan))
    step = (
        f"those of an update on {plan.batch_size} examples of {plan.length:,} tokens that all "
        "count, run on shapes without data; shorter examples and prompts take less"
        if plan.step is not None
        else "not known, and left out: this model does not run without data"
    )
    console.print(f"Delta file: {readable(plan.file)}. ~ marks estimates. Activations are {step}.")


def _kinds(plan: Plan) -> Table:
    table = Table(title="To be trained", title_justify="left", show_footer=True)
    layers = sum(kind.layers for kind in plan.kinds)
    table.add_column("layer", "together")
    table.add_column("layers", f"{layers:,}", justify="right")
    table.add_column("shape", justify="right")
    table.add_column("density", f"{plan.density:.3%}", justify="right")
    table.add_column("parameters", f"{plan.entries:,}", justify="right")
    for kind in plan.kinds:
        height, width = kind.shape
        shape, density = f"{height:,} × {width:,}", f"{kind.density:.3%}"
        table.add_row(kind.kind, f"{kind.layers:,}", shape, density, f"{kind.entries:,}")
    return table


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory", title_justify="left", show_footer=True)
    table.add_column("", "expected peak")
    table.add_column("bytes", f"~ {readable(plan.peak)}", justify="right")
    table.add_column("per parameter", justify="right")
    table.add_row("base", readable(plan.base))
    for what, size in (
        ("values", plan.value),
        ("positions", plan.position),
        ("gradients", plan.gradient),
        (f"moments ({plan.updater})", plan.moments),
        ("gathered by the selector", plan.selection),
    ):
        table.add_row(what, readable(size), f"{size / plan.entries:.2f}")
    if plan.step is not None:
        table.add_row("activations, logits, temporaries", f"~ {readable(plan.step)}")
    if plan.before:
        table.add_row("first support, before the updates", f"~ {readable(plan.before)}")
    if plan.libraries is not None:
        table.add_row("libraries", readable(plan.libraries))
    if plan.retention > 1:
        freed = int(plan.live * (plan.retention - 1))
        table.add_row("freed, but held by the C library", f"~ {readable(freed)}")
    return table
