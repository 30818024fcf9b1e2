"""Random patch sets on `Mixed`, and everything of a model and its session that a failure must leave alone."""

from __future__ import annotations

import random

import torch

from lib_precision_lora.branch import PatchSession
from tests.branch.hosts import IDS, IMAGE, SHAPES, Mixed, hooks_of, image_of
from tests.branch.recipes import recipe

MATRIX_KINDS = ("lora-rank-1", "lora-rank-8-fp16", "tucker-rank-2-fp16", "diff-bf16", "set-fp16")
VECTOR_KINDS = ("diff-fp32", "set-fp16")

Items = list[tuple[str, dict[str, object], float]]


def kinds_for(shape: tuple[int, ...]) -> tuple[str, ...]:
    return VECTOR_KINDS if len(shape) == 1 else MATRIX_KINDS


def files_on(names: list[str], strength: float = 1.0, kind: int = 0) -> Items:
    """One file with one adapter on each of these parameters, named as files name modules where that works."""
    adapters = {
        name: recipe(kinds_for(SHAPES[name])[kind % len(kinds_for(SHAPES[name]))], SHAPES[name]).adapter
        for name in names
    }
    return [("file", adapters, strength)]


def random_files(chance: random.Random) -> Items:
    """One or two files on a random choice of parameters."""
    return [
        item
        for _ in range(chance.choice((1, 1, 2)))
        for item in files_on(
            chance.sample(list(SHAPES), chance.randint(1, 4)),
            chance.choice((-1.0, 0.5, 1.0)),
            chance.randrange(5),
        )
    ]


EVERYTHING = files_on(list(SHAPES))


def outputs(model: Mixed) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, IMAGE)


def snapshot(model: Mixed, session: PatchSession) -> dict[str, object]:
    """What can be seen of a session and its model, to the bit; the forward first, as it makes the stacks."""
    result = outputs(model).numpy().tobytes()
    return {
        "attached": set(session.attached),
        "pieces": {name: id(attached.piece) for name, attached in session._attached.items()},
        "stacks": {
            name: id(attached.piece._stack)
            for name, attached in session._attached.items()
            if getattr(attached.piece, "_operands", None) is not None
        },
        "parameters": image_of(model),
        "hooks": hooks_of(model),
        "outputs": result,
    }
