"""Saving a checkpoint while LoRAs are active: the base with the LoRAs merged, as the host would without us.

get_state_dict_after_quant     the host's own result; what our LoRAs change in it is `round(W_eff)`
save_unet, save_checkpoint     the file appears when it is whole; page and log say what was lost

A GGUF parameter is written dense wherever LoRAs are saved, and so are NF4 and int8 in one buffer: the host
writes their bytes without their type, which nothing can load. What no LoRA changes has the bytes that the
host gives it, and names are the host's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib_precision_lora.branch.session.rounding import rounded
from lib_precision_lora.host.generation.notices import name_of
from lib_precision_lora.host.generation.pop_ups import page_error, page_waits, pop_up
from lib_precision_lora.host.generation.progress import Stage, unshown
from lib_precision_lora.host.loras.hosted import HostedSession
from lib_precision_lora.host.replacement import Replacement
from lib_precision_lora.plain_text import sentence
from lib_precision_lora.report.saved import Saved
from lib_precision_lora.storage import StorageError, encode, stored_weight, unlabelled
from lib_precision_lora.ticks import Tick

logger = logging.getLogger("lib_precision_lora")

StateDict = dict[str, Tensor]
UNET_ALONE = "save_unet"
SAVES = (UNET_ALONE, "save_checkpoint")
WITHOUT = (
    "Saved without LoRAs: none is active on what was saved. A checkpoint that was loaded anew for this has "
    "none: generate once with the LoRAs and without an override, and save again"
)


class SavingError(RuntimeError):
    """Nothing was saved; the message says why."""


class Saving:
    """What is swapped of the host's saving.

    sessions: those that there are, by model; stage: where merging is shown; prompted: whether the last prompt
    had LoRAs. A click saves in a thread of its own, beside a job that may run. Nothing is attached, taken
    off, moved or written in a model.
    """

    def __init__(
        self,
        sessions: Mapping[nn.Module, HostedSession],
        stage: Stage = unshown,
        prompted: Callable[[], bool] = lambda: False,
    ) -> None:
        self._sessions, self._stage, self._prompted = sessions, stage, prompted
        self._writing = threading.local()  # its `saved` is that of the file which this thread writes now

    def replacements(self, utils: Any, engine: type) -> list[Replacement]:
        """utils: the host's module; engine: the base of its checkpoints, some of which save in their own
        way."""
        return [
            Replacement(utils, "get_state_dict_after_quant", self._make_state_dict),
            *(
                Replacement(owner, name, partial(self._make_save, name))
                for owner in (engine, *_subclasses(engine))
                for name in SAVES
                if name in vars(owner)
            ),
        ]

    def _make_state_dict(self, host_state_dict: Callable[..., StateDict]) -> Callable[..., StateDict]:
        def get_state_dict_after_quant(model: nn.Module, prefix: str = "") -> StateDict:
            state: StateDict = host_state_dict(model, prefix)
            saved = self._present()
            if saved is None and not any(True for _ in self._attached(model)):
                return state
            part = Saved()
            for root, session in self._attached(model):
                with self._stage("merging LoRAs into what is saved") as tick:
                    _put_effective(state, model, prefix, root, session, part, tick)
            with self._stage("unpacking weights for what is saved") as tick:
                _unpack(state, model, prefix, part, tick)
            if saved is None:
                _tell(part)
            else:
                saved.add(part)
            return state

        return get_state_dict_after_quant

    def _make_save(self, name: str, host_save: Callable[..., Any]) -> Callable[..., Any]:
        def save(engine: Any, filename: Any) -> Any:
            if self._present() is not None:
                return host_save(engine, filename)
            if not self._anything_attached(engine, name):
                path = host_save(engine, filename)
                if self._prompted():
                    _say(WITHOUT)
                return path
            partial, saved = f"{filename}.part", Saved()
            self._writing.saved = saved
            try:
                path = host_save(engine, partial)
                if os.path.exists(partial):  # whatever the host returns
                    os.replace(partial, filename)
                    path = filename if path == partial else path
            except Exception as error:
                logger.exception("saving with LoRAs failed")
                reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                raise _as_the_page_shows_it(f"Nothing was saved: {reason}") from error
            finally:
                self._writing.saved = None
                with contextlib.suppress(FileNotFoundError):
                    os.remove(partial)
            _tell(saved)
            return path

        return save

    def _present(self) -> Saved | None:
        """Of the file that is written now, by functions of the host that may call each other."""
        return getattr(self._writing, "saved", None)

    def _attached(self, module: nn.Module) -> Iterator[tuple[nn.Module, HostedSession]]:
        """Where something stands on this module, or in a model that it is part of, or that is part of it."""
        for root, session in list(self._sessions.items()):  # a generation may make another one meanwhile
            if session.attached and (_is_within(root, module) or _is_within(module, root)):
                yield root, session

    def _anything_attached(self, engine: Any, name: str) -> bool:
        """On the models that this function of the host saves."""
        objects = engine.forge_objects
        encoders = [] if objects.clip is None or name == UNET_ALONE else [objects.clip.cond_stage_model]
        models = [objects.unet.model, *encoders]
        return any(True for model in models for _ in self._attached(model))


def _subclasses(engine: type) -> Iterator[type]:
    for subclass in engine.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _is_within(root: nn.Module, module: nn.Module) -> bool:
    """Whether a module is a model itself, or a part of it."""
    return any(child is module for child in root.modules())


def _put_effective(
    state: StateDict,
    model: nn.Module,
    prefix: str,
    root: nn.Module,
    session: HostedSession,
    saved: Saved,
    tick: Tick,
) -> None:
    """Exchange what the LoRAs on `root` change of this model's state. Raises `PatchError`."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(f"{prefix}{path}." if path else prefix)
    weights = session.effective()
    for done, (name, (site, effective)) in enumerate(weights.items()):
        tick(done, len(weights))
        owner = root.get_submodule(name.rpartition(".")[0])
        places = [place for module in {site.module, owner} for place in paths.get(module, ())]
        if not places:
            continue
        result = rounded(name, site, effective)
        for place in places:
            _exchange(state, place, result.entries, name)
        saved.losses.append(result.loss)
    saved.sources.update(dict.fromkeys(name_of(source) for source in session.sources))
    saved.host_layers += sum(session.host_layers.values())


def _unpack(state: StateDict, model: nn.Module, prefix: str, saved: Saved, tick: Tick) -> None:
    """Write every parameter dense whose bytes the file would not explain, and that is not so already."""
    packed = [
        (f"{prefix}{path}." if path else prefix, module, attribute, parameter, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for attribute, parameter in module._parameters.items()
        if parameter is not None and (name := unlabelled(parameter)) is not None
    ]
    for done, (place, module, attribute, parameter, name) in enumerate(packed):
        tick(done, len(packed))
        saved.unpacked[name] += 1
        if not state[place + attribute].is_floating_point():
            with torch.no_grad():
                encoded = encode(module, attribute, parameter, stored_weight(parameter, module).dense())
            _exchange(state, place, encoded.entries, place + attribute)


def _exchange(state: StateDict, place: str, entries: Mapping[str, Tensor], name: str) -> None:
    """Nothing comes in under a name that the host's own file would not have; each place has memory of its
    own, since safetensors refuses what is shared.

    What is unpacked goes to the CPU: all of it would not fit beside the model on a card.
    """
    for key, value in entries.items():
        if place + key not in state:
            raise StorageError(
                f"layer {name}: its {key} is not among what this WebUI saves; lower the strengths of the "
                "LoRAs, or store the checkpoint in a wider type"
            )
        unpacked = value.is_floating_point() and not state[place + key].is_floating_point()
        state[place + key] = value.to("cpu" if unpacked else value.device, copy=True)


def _tell(saved: Saved) -> None:
    if saved.losses:
        _say(saved.sentence, serious=saved.most_is_lost)


def _say(message: str, serious: bool = True) -> None:
    """To the log, and to the page where it has asked for this."""
    logger.log(logging.WARNING if serious else logging.INFO, "%s", message)
    if page_waits():
        pop_up(message, serious)


def _as_the_page_shows_it(message: str) -> Exception:
    """The page shows the text of gradio's own exceptions alone."""
    return page_error(message) if page_waits() else SavingError(sentence(message))
