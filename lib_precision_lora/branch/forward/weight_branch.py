"""The branch of one module: its effective weight and bias, made ready for inputs of one device and type."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor

from lib_precision_lora.adapters.steps import Add, Left
from lib_precision_lora.adapters.terms import Kronecker
from lib_precision_lora.branch.algebra.effective import EffectiveWeight, Piece
from lib_precision_lora.branch.algebra.identity import structure
from lib_precision_lora.branch.algebra.vector import DeltaVector
from lib_precision_lora.branch.arithmetic.chunks import chunk_bytes, token_bytes
from lib_precision_lora.branch.arithmetic.device_copies import DeviceCopies
from lib_precision_lora.branch.arithmetic.plain import PlainStack, build_plain
from lib_precision_lora.branch.arithmetic.plain_form import PlainForm
from lib_precision_lora.branch.arithmetic.plain_kronecker import (
    KroneckerForm,
    PlainKronecker,
    build_kronecker,
    single_kronecker,
)
from lib_precision_lora.branch.arithmetic.product import Compute, Product, choose_product, process_choices
from lib_precision_lora.branch.arithmetic.product_cost import ProductCost
from lib_precision_lora.branch.arithmetic.stack import (
    Stack,
    build_stack,
    column_scales,
    factor_types,
    low_rank,
)
from lib_precision_lora.branch.forward.autocast import type_within, without_autocast
from lib_precision_lora.branch.forward.operands import (
    Operands,
    factor_bytes,
    is_plain,
    phases_of,
    up_blocks,
)
from lib_precision_lora.branch.forward.streaming import FactorStream, map_tensors, pinned
from lib_precision_lora.branch.forward.turned_input import (
    InputTurns,
    TurnedInput,
    input_turns,
    turned_before,
    turns_of_all_rows,
)
from lib_precision_lora.branch.forward.wide_input import WideInput

logger = logging.getLogger(__name__)

Made = TypeVar("Made")
Plain = PlainStack | PlainKronecker
"""What is added to y in y's own type."""


class WeightBranch:
    """What the branches of linear, conv and embedding modules share.

    Makes `Operands` when an input first shows its device and type, and keeps the last ones. The strengths
    live outside of the stack, so that `restrength` leaves the factors where they are.

    stream: None while the factors stay on the device; else what brings them there from RAM each time.
    spare: the stream to take to where the device has no memory for them. convolution: whether the input is
    treated whole, and its positions in blocks; placeable: whether forwards take the factors from the device;
    can_turn: whether a module's input can be turned before it; adds_kronecker: whether one Kronecker
    product can be added to y as it is.
    """

    convolution = False
    can_turn = False
    adds_kronecker = False
    placeable = True

    def __init__(self, weight: EffectiveWeight, bias: EffectiveWeight | None, compute: Compute) -> None:
        self.compute = compute
        self.rows, self.columns = weight.stored.shape[0], math.prod(weight.stored.shape[1:])
        self.channels = weight.stored.shape[1]
        self.wide_input = WideInput.of(weight.stored)
        self.steps, self.pieces = weight.steps, weight.pieces
        self.bias = None if bias is None else DeltaVector(bias)
        plain = bias is None and self.wide_input is None and is_plain(self.steps, self.pieces)
        self._types = factor_types(self.steps) if plain else None
        self._kronecker = self._single_kronecker(bias)
        self.stream: FactorStream | None = None
        self.spare: FactorStream | None = None
        self._stack: Stack | None = None
        self._operands: Operands | Plain | None = None
        self._made_for: tuple[torch.device, PlainForm | KroneckerForm | bool, bool] | None = None
        self._asked: tuple[object, ...] | None = None
        self._turned: TurnedInput[Operands] | None = None
        self._copies: DeviceCopies | None = None

    def structure(self) -> tuple[object, ...]:
        """Equal for two branches that differ in strengths only."""
        return (
            type(self),
            self.compute,
            self.bias is None,
            structure(self.pieces, self.steps),
        )

    def restrength(self, other: WeightBranch) -> None:
        """Take the strengths of a branch of equal structure; the factors stay where they are."""
        self.pieces, self.bias = other.pieces, other.bias
        self.take_steps(other.steps)

    def take_steps(self, steps: tuple[Add | Left, ...]) -> None:
        """Take steps that differ from those that there are in strengths only."""
        self.steps = steps
        if self._made_for is None or self._operands is None:
            return
        if isinstance(self._operands, PlainStack | PlainKronecker):
            made = self._operands.with_strengths([step for step in steps if isinstance(step, Add)])
            self._operands = self._kept(made, self._made_for[0])
        elif self.bias is None and is_plain(steps, self.pieces):
            made_again = dataclasses.replace(self._operands, scale=self._scale())
            self._operands = self._kept(made_again, self._made_for[0])
        else:
            device, _, before = self._made_for
            self._operands = self._assemble(self._operands.product, device, before)

    def operands(self, x: Tensor, y: Tensor | None) -> Operands | Plain:
        """The operands for this input: made at the first forward, then found.

        y: the output that a plain stack may be added to; None where it may not be.
        """
        turned, self._turned = self._turned, None
        if turned is not None and turned.given is x:
            return turned.operands
        made = self.ready(x.device, x.dtype, y is not None and y.dtype == x.dtype)
        return self._brought(made, x.device)

    @property
    def turns_inputs(self) -> bool:
        """Whether there are activations whose module is given another input than they are."""
        return self.can_turn and self.wide_input is None and bool(turns_of_all_rows(self.pieces))

    def turned(self, x: Tensor) -> Tensor | None:
        """What the module is to be given instead of x, in a tensor of its own; None where that is x.

        The next forward with this very x counts on it.
        """
        self._turned = None
        if not self.turns_before(type_within(x)):
            return None
        with without_autocast(x.device.type):
            operands = self._brought(self.ready(x.device, x.dtype, before=True), x.device)
            assert isinstance(operands, Operands)
            assert operands.before is not None
            made = self._turn(operands.before, x)
        self._turned = TurnedInput(x, operands)
        return made

    @property
    def given(self) -> Tensor | None:
        """What stood in the place of the module's input that was turned, if it was."""
        return None if self._turned is None else self._turned.given

    def _turn(self, before: InputTurns, x: Tensor) -> Tensor:
        """`R x`."""
        return before.apply(x, -1)

    def turns_before(self, dtype: torch.dtype) -> bool:
        """Whether the module is given an input of this type turned."""
        return self.turns_inputs and turned_before(self.pieces, dtype)

    def _brought(self, made: Operands | Plain, device: torch.device) -> Operands | Plain:
        return made if self.stream is None else self.stream.bring(self, made, device)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make the operands for inputs on this device and of this type ahead of the first forward."""
        self.ready(device, dtype, before=self.turns_before(dtype))

    def ready(
        self, device: torch.device, dtype: torch.dtype, plain: bool = True, before: bool = False
    ) -> Operands | Plain:
        """The operands for inputs on this device and of this type, where they stay: there, or in RAM.

        plain: whether outputs are of this type, too; before: the module is given its input turned. Where the
        device has no memory for them, they stay in RAM from now on.
        """
        asked = device, dtype, plain, before, process_choices(device, dtype, self.convolution)
        if asked == self._asked and self._operands is not None:
            return self._operands
        form = self._form(device, dtype) if plain else None
        product = choose_product(self.compute, device, dtype)
        made_for = (device, product.half if form is None else form, before)
        if self._operands is None or self._made_for != made_for:
            self.release()
            try:
                self._operands = self._make(product, form, device, before)
            except torch.cuda.OutOfMemoryError:
                if self.spare is None or self.stream is not None:
                    raise
                logger.warning(
                    "no memory on %s for the factors of a layer, they are streamed from RAM", device
                )
                self.stream = self.spare
                self._operands = self._make(product, form, device, before)
            self._made_for = made_for
        self._asked = asked
        return self._operands

    def waiting_for(self, device: torch.device) -> Operands | Plain | None:
        """The operands in RAM that were made for this device, if the branch is streamed."""
        here = self.stream is not None and self._made_for is not None and self._made_for[0] == device
        return self._operands if here else None

    def reside(self, stream: FactorStream | None) -> None:
        """Keep the factors on the device (None), or in RAM and have them streamed."""
        if stream is not self.stream:
            self.release()
            self.stream = stream

    @property
    def factor_bytes(self) -> int:
        return factor_bytes(self.steps)

    def placed(self) -> Iterator[Tensor]:
        """Every tensor that was made for a device, or for the way there.

        Another thread may release them meanwhile.
        """
        stack = self._stack
        if stack is not None:
            yield from stack.tensors()
        found: list[Tensor] = []
        map_tensors(self._operands, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        yield from found

    def release(self) -> None:
        """Let go of everything that was made for a device."""
        self._stack = self._operands = self._made_for = self._copies = self._turned = self._asked = None
        if self.wide_input is not None:
            self.wide_input.drop()
        if self.bias is not None:
            self.bias.release()

    def _single_kronecker(self, bias: EffectiveWeight | None) -> Kronecker | None:
        """The Kronecker product that is all that this branch adds."""
        if not self.adds_kronecker or bias is not None or self.wide_input is not None:
            return None
        turned = any(piece.turns for piece in self.pieces)
        return None if turned else single_kronecker(self.steps, self.rows, self.columns)

    def _form(self, device: torch.device, dtype: torch.dtype) -> PlainForm | KroneckerForm | None:
        """The form of its products where the branch is a plain stack, or one Kronecker product; None where
        it is neither."""
        if self._kronecker is not None:
            return KroneckerForm.of(self.compute, device, dtype, self._kronecker)
        if self._types is None:
            return None
        return PlainForm.of(self.compute, device, dtype, self._types, self.convolution)

    def _make(
        self, product: Product, form: PlainForm | KroneckerForm | None, device: torch.device, before: bool
    ) -> Operands | Plain:
        """Operands at home: on the device, or in RAM for it."""
        home = device if self.stream is None else torch.device("cpu")
        if isinstance(form, KroneckerForm):
            (step,) = (step for step in self.steps if isinstance(step, Add))
            return self._kept(build_kronecker(form, step, home), device)
        if form is not None:
            made = build_plain(form, low_rank(self.steps), up_blocks(self.steps, self.rows), home)
            return self._kept(made, device)
        self._stack = build_stack(low_rank(self.steps), up_blocks(self.steps, self.rows), product.half, home)
        self._stack = self._kept(self._stack, device)
        self._copies = DeviceCopies(home)
        return self._assemble(product, device, before)

    def _assemble(self, product: Product, device: torch.device, before: bool) -> Operands:
        assert self._copies is not None
        copies, home = self._copies, self._copies.device
        down = None if self._stack is None else self._stack.down
        cost = ProductCost.of(product, device, self.convolution)
        turns, beside = None, self.pieces
        if before:
            mine = copies.turns(turns_of_all_rows(self.pieces))
            turns, beside = input_turns(mine, self.channels, cost, device), (Piece(0, self.rows),)
        turned = any(piece.turns for piece in beside)
        pieces = tuple(
            dataclasses.replace(
                piece,
                turns=copies.turns(piece.turns),
                share=None if piece.share is None else piece.share.to(home),
            )
            for piece in beside
        )
        phases = tuple(phases_of(self.steps, self._stack, self.rows, copies))
        plain = not turned and len(phases) == 1 and not phases[0].lefts
        bias = None if self.bias is None else self.bias.on(home)
        turns_beside = [turn for piece in beside for turn in piece.turns]
        size = token_bytes(
            self.columns,
            self.rows,
            0 if down is None else down.shape[0],
            self.steps,
            turns_beside,
            cost,
            self.convolution,
        )
        at_once = max(1, chunk_bytes(device, self.steps, turns_beside) // max(1, size))
        made = Operands(product, down, self._scale(), phases, pieces, bias, plain, size, at_once, turns)
        return self._kept(made, device)

    def _scale(self) -> Tensor | None:
        """Of each rank of the stack, where there is one."""
        if self._stack is None:
            return None
        exponents = self._stack.exponents
        return column_scales(low_rank(self.steps)).to(exponents.device) * exponents

    def _kept(self, made: Made, device: torch.device) -> Made:
        """As it waits at home: what is streamed to a card, in memory from which a card copies by itself."""
        return pinned(made) if self.stream is not None and device.type == "cuda" else made
