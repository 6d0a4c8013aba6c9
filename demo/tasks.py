"""The demo's tasks: every item is made from templates, and no held-out item occurs in training."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PEOPLE = (
    "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Lena Max Nora Oskar Paula Rosa".split()
)
FAMILIES = (
    "Weber Novak Silva Rossi Jansen Larsen Moreau Kowalski Horvat Byrne Costa Lindgren".split()
)
FIRMS = "Nordwind Bluebird Kestrel Harbor Quartz Lantern Maple Summit Tandem Orchard".split()
CITIES = "Oslo Rome Paris Berlin Madrid Vienna Dublin Lisbon Prague Athens".split()
COLOURS = "red blue green white black yellow".split()
ITEMS = "lamps chairs books plates mugs candles towels mirrors clocks vases".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)

Pair = tuple[str, str]  # prompt, completion


@dataclass(frozen=True, slots=True)
class Task:
    """A skill the base lacks: all of its items, and how long to train it."""

    name: str
    description: str
    pairs: Callable[[], Iterator[Pair]]
    updates: int


def orders() -> Iterator[Pair]:
    """Turn an order into JSON."""
    forms = (
        "{name} would like {count} {colour} {item} sent to {city}.",
        "Please ship {count} {colour} {item} to {name} in {city}.",
        "From {city}: {count} {colour} {item} for {name}.",
    )
    choices = itertools.product(forms, PEOPLE, range(2, 10), COLOURS, ITEMS, CITIES)
    for form, name, count, colour, item, city in choices:
        text = form.format(name=name, count=count, colour=colour, item=item, city=city)
        answer = {"name": name, "city": city, "item": f"{colour} {item}", "count": count}
        yield f"Order: {text}\nJSON:", f" {json.dumps(answer)}"


def dates() -> Iterator[Pair]:
    """Write a date as ISO 8601."""
    forms = ("{day} {month} {year}", "{month} {day}, {year}", "{day}. {month} {year}")
    months = enumerate(MONTHS, start=1)
    for form, (number, month), day, year in itertools.product(
        forms, months, range(1, 29), range(1950, 2030)
    ):
        text = form.format(day=day, month=month, year=year)
        yield f"Date: {text}\nISO:", f" {year}-{number:02d}-{day:02d}"


def emails() -> Iterator[Pair]:
    """Make a person's e-mail address."""
    forms = ("{first} {last} of {firm}", "{first} {last}, {firm}", "{firm}: {first} {last}")
    for form, first, last, firm in itertools.product(forms, PEOPLE, FAMILIES, FIRMS):
        text = form.format(first=first, last=last, firm=firm)
        address = f"{first}.{last}@{firm}.com".lower()
        yield f"Person: {text}\nE-mail:", f" {address}"


TASKS = (
    Task("orders", "turns an order into JSON", orders, updates=32),
    Task("dates", "writes a date as ISO 8601", dates, updates=40),
    Task("emails", "makes a person's e-mail address", emails, updates=32),
)


def split(task: Task, *, train: int, held_out: int) -> tuple[list[Pair], list[Pair]]:
    """Draw disjoint training and held-out items."""
    pairs = list(task.pairs())
    random.Random(0).shuffle(pairs)
    return pairs[held_out : held_out + train], pairs[:held_out]


def write_examples(path: Path, pairs: list[Pair]) -> None:
    """Write training data as the trainer reads it."""
    lines = (json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in pairs)
    path.write_text("".join(f"{line}\n" for line in lines))
