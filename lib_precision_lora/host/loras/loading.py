"""The prompt's LoRAs become patches of the checkpoint: our `load_networks`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lib_precision_lora.adapters.adapter import AdapterError, require_number
from lib_precision_lora.host.generation.notices import Notices
from lib_precision_lora.host.generation.progress import Interrupted, Progress
from lib_precision_lora.host.generation.record import Record
from lib_precision_lora.host.generation.report import FileReport
from lib_precision_lora.host.interface import Host
from lib_precision_lora.host.loras.files import FileInterrupted, FileProblem, LoraFiles, Stamp
from lib_precision_lora.host.loras.kept import Kept
from lib_precision_lora.host.loras.matching import FileMatch, KeyMap, key_map_of, match_file
from lib_precision_lora.host.loras.strengths import reportable
from lib_precision_lora.names.architectures import by_kind, describe_leftover

logger = logging.getLogger("lib_precision_lora")

LOGGED_KEYS = 8
"""How many keys without a layer the log names unless it is to be detailed."""

OUR_HASH = "Precision LoRA"
"""What stands in the engine's `current_lora_hash`, so that the host's own loader never believes that its
patches are in place."""


class NetworkLoader:
    """Reads the LoRAs of a prompt and puts them on the checkpoint's patchers.

    versions: the files of the last call (None for one that was left out), for the key of cached
    conditioning.
    """

    def __init__(
        self, host: Host, files: LoraFiles, notices: Notices, record: Record, progress: Progress
    ) -> None:
        self._host = host
        self._files = files
        self._progress = progress
        self._notices = notices
        self._record = record
        self._patchers: weakref.WeakKeyDictionary[Any, Kept] = weakref.WeakKeyDictionary()
        self._key_maps: weakref.WeakKeyDictionary[nn.Module, KeyMap] = weakref.WeakKeyDictionary()
        self._matches: weakref.WeakKeyDictionary[nn.Module, dict[Stamp, FileMatch]] = (
            weakref.WeakKeyDictionary()
        )
        self.versions: tuple[Stamp | None, ...] = ()

    def load(
        self,
        names: Sequence[str],
        te_multipliers: Sequence[float],
        unet_multipliers: Sequence[float],
        text_encoders: bool = True,
        detailed_log: bool = False,
    ) -> None:
        """Put these LoRAs, in this order, on the current checkpoint; report those that cannot be applied.

        text_encoders: whether they act on these as well; where not, their strength there is 0.
        """
        import networks
        from modules import sd_models

        engine = sd_models.model_data.get_sd_model()
        if engine is None:
            return
        networks.loaded_networks.clear()
        self.versions = ()
        kept = self._patchers.get(engine)
        if kept is None:
            if not names:
                self._use(engine, None)
                return
            kept = self._patchers[engine] = self._host.keep(engine)
        kept.start(engine)
        matches: dict[Stamp, FileMatch] = {}
        versions: list[Stamp | None] = []
        for name, te_multiplier, unet in zip(names, te_multipliers, unet_multipliers, strict=True):
            te, before = te_multiplier if text_encoders else 0.0, kept.patches()
            try:
                with self._blamed(name):
                    stamp, match, network = self._read(engine, name, unet, te)
                    source = kept.add(network.network_on_disk.filename, match, unet, te)
                    report = report_file(name, match, unet, te, self._files.digests[stamp].digest)
                    log_applied(name, match, unet, te, None if detailed_log else LOGGED_KEYS)
            except FileProblem as problem:
                kept.put_back(before)
                self.refuse(name, str(problem), unet, te, failed=not isinstance(problem, FileInterrupted))
                versions.append(None)
                continue
            self._record.present.add(report, source, network.network_on_disk.filename)
            matches[stamp] = match
            versions.append(stamp)
            networks.loaded_networks.append(network)
        self.versions = tuple(versions)
        self._matches[engine.forge_objects_original.unet.model] = matches
        self._use(engine, kept)
        if hasattr(engine, "comments"):  # the WebUI gives it to an engine when a generation begins
            self._notices.show(comment_once(engine.comments), engine.extra_generation_params)

    def refuse(self, name: str, reason: str, unet: float = 0.0, te: float = 0.0, failed: bool = True) -> None:
        """Say that a LoRA of the prompt was left out. failed: False where the user wanted it so."""
        sentence = f"LoRA {name} was left out: {reason}"
        self._notices.problem(name, sentence, failed)
        self._record.present.add(FileReport(name, reportable(unet), reportable(te), problem=sentence))

    def refuse_all(self, names: Sequence[str], reason: str) -> None:
        """Say that not one of these LoRAs is applied, whatever was said of them before."""
        present = self._record.present
        known = {entry.file.name for entry in present.entries}
        for name in dict.fromkeys(names):
            if name in known:
                self._notices.problem(name, f"LoRA {name} was left out: {reason}")
            else:
                self.refuse(name, reason)
        present.problem(None, f"No LoRA was applied: {reason}")

    def take_off(self) -> None:
        """Let the current checkpoint go on without LoRAs, as far as that can be done."""
        import networks
        from modules import sd_models

        self.versions = ()
        networks.loaded_networks.clear()
        for kept in self._patchers.values():
            kept.put_back({})
        engine = sd_models.model_data.get_sd_model()
        try:
            if engine is not None:
                self._use(engine, None)
        except Exception:
            logger.exception("giving the checkpoint its own patchers back failed; ours hold no LoRA")

    def match(self, engine: Any, name: str) -> tuple[str, FileMatch]:
        """The path of the file of this name, and what it would do to the checkpoint; nothing is applied, and
        nothing read of a pickled file.

        Raises `FileProblem`.
        """
        import networks

        on_disk = find_network(networks, name)
        return on_disk.filename, self._match(engine, on_disk.name, Stamp.of(on_disk.filename), pickles=False)

    def stand_back(self) -> None:
        """Give the engines their own patchers back; the host's loader starts anew."""
        for engine in list(self._patchers):
            self._use(engine, None)
            engine.current_lora_hash = OUR_HASH
        self._patchers.clear()
        self._key_maps.clear()
        self._matches.clear()
        self._files.clear()
        self.versions = ()

    def _use(self, engine: Any, kept: Kept | None) -> None:
        """Make these patchers (the checkpoint's own where None) the engine's current ones."""
        engine.current_lora_hash = OUR_HASH if kept is not None else str([])
        self._host.use(engine, kept)

    def _read(self, engine: Any, name: str, unet: float, te: float) -> tuple[Stamp, FileMatch, Any]:
        """The file of this name: its version, its patches, and how the WebUI lists it.

        Raises `AdapterError` for strengths that are none, and `FileProblem`.
        """
        import networks
        from modules import shared

        require_number("its strength", unet)
        require_number("its strength in the text encoders", te)
        on_disk = find_network(networks, name)
        stamp = Stamp.of(on_disk.filename)
        match = self._match(engine, on_disk.name, stamp)
        network = networks.load_network(name, on_disk)
        network.mentioned_name = name
        listed = self._files.digests[stamp].listed
        hashes = not getattr(shared.cmd_opts, "no_hashing", False)
        if hashes and on_disk.hash != listed:  # none yet, or that of a former file
            on_disk.set_hash(listed)
        return stamp, match, network

    @contextmanager
    def _blamed(self, name: str) -> Iterator[None]:
        """Whatever fails within is this file's: a `FileProblem`. Any other exception the WebUI would swallow,
        and sample with the former LoRAs."""
        try:
            yield
        except FileProblem:
            raise
        except AdapterError as error:
            raise FileProblem(str(error)) from error
        except Interrupted as interrupted:
            raise FileInterrupted(
                "the generation was interrupted while it was being read; the next one reads it again"
            ) from interrupted
        except Exception as error:
            logger.exception("reading LoRA %s failed", name)
            raise FileProblem(
                f"reading it failed ({type(error).__name__}: {error}); please report it with the "
                "console's log"
            ) from error

    def _match(self, engine: Any, name: str, stamp: Stamp, pickles: bool = True) -> FileMatch:
        """The file's patches for this checkpoint, from the last call where nothing has changed."""
        original = engine.forge_objects_original
        kept = self._matches.get(original.unet.model, {})
        if stamp in kept:
            return kept[stamp]
        unet = self._key_map(original.unet.model, self._host.lora.model_lora_keys_unet)
        clip = None
        if original.clip is not None:
            clip = self._key_map(original.clip.cond_stage_model, self._host.lora.model_lora_keys_clip)
        content = self._files.read(stamp, pickles)
        with self._progress.stage(f"LoRA {name}: checking") as tick:
            return match_file(name, content, unet, clip, self._host.parse, tick)

    def _key_map(self, model: nn.Module, make: Callable[..., Mapping[str, Any]]) -> KeyMap:
        """The host's names for a model's parameters, made in a dictionary of its own: the host's default
        one is shared by all models and would carry names from one to the next."""
        if model not in self._key_maps:
            self._key_maps[model] = key_map_of(weakref.proxy(model), make(model, {}), self._host.put_aside)
        return self._key_maps[model]


def comment_once(comments: list[str]) -> Callable[[str], None]:
    """Appends a sentence that is not there yet."""
    return lambda message: None if message in comments else comments.append(message)


def find_network(networks: Any, name: str) -> Any:
    """The LoRA of this name among those on disk, looked for once more if it is new.

    Raises `FileProblem` where there is none.
    """
    for refresh in (
        lambda: None,
        lambda: networks.update_available_networks_by_names([name]),
        networks.list_available_networks,
    ):
        refresh()
        forbidden = name.lower() in networks.forbidden_network_aliases
        aliases = networks.available_networks if forbidden else networks.available_network_aliases
        found = aliases.get(name)
        if found is not None:
            return found
    raise FileProblem("there is no file of this name in the LoRA folder; the list was read anew just now")


def report_file(name: str, match: FileMatch, unet: float, te: float, digest: str) -> FileReport:
    """What the file brings to this checkpoint, before anything is attached; at a strength of 0, nothing."""
    return FileReport(
        name,
        unet,
        te,
        match.summary,
        match.ranks,
        match.alphas,
        len(match.unet) if unet else 0,
        len(match.text_encoder) if te else 0,
        unmatched=match.unmatched,
        findings=match.findings,
        digest=digest,
    )


def log_applied(name: str, match: FileMatch, unet: float, te: float, keys: int | None) -> None:
    """One line for the log: what the file does, and what of it was not used; one more for each finding.

    keys: how many of those that belong to no layer are named, None for all of them.
    """
    skipped = ""
    if match.unmatched:
        shown = len(match.unmatched) if keys is None else keys
        described = describe_leftover(match.unmatched, shown)
        skipped = f"; {len(match.unmatched)} keys belong to no layer: {described}"
    if match.without_encoder:
        encoders = ", ".join(sorted({kind.label for kind in by_kind(match.without_encoder)}))
        skipped += f"; {len(match.without_encoder)} keys are for what is not loaded: {encoders}"
    for finding in match.findings:
        logger.warning("LoRA %s: %s", name, finding)
    logger.info(
        "LoRA %s: %d layers of the model at %g, %d of the text encoder at %g (%s)%s",
        name,
        len(match.unet),
        unet,
        len(match.text_encoder),
        te,
        match.summary,
        skipped,
    )
