"""Merged dense layers: one rounding, the host's own objects put back, whatever happens in between."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn

from lib_precision_lora.adapters import Diff, read_adapters
from lib_precision_lora.branch import PatchSession, merged
from lib_precision_lora.branch import session as session_module
from lib_precision_lora.branch.policy import SMALL_LAYER
from tests.branch.hosts import Holder, Mixed, hooks_of, image_of, stored_holder
from tests.branch.meter import metered
from tests.branch.patch_sets import EVERYTHING, Items, files_on, outputs
from tests.branch.recipes import generator, noise
from tests.branch.test_failure import CHANGED, FEWER, FORMER, SAME_FACTORS, InjectedError, failing
from tests.families import BASE_STD, FAMILIES, Family, family
from tests.oracles import Step, merge

MERGED_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
LAYERS = {
    "linear": lambda: nn.Linear(64, 16),
    "conv": lambda: nn.Conv2d(8, 16, 3, padding=1),
    "conv, channels last": lambda: nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last),
    "conv 1d": lambda: nn.Conv1d(8, 16, 5),
    "embedding": lambda: nn.Embedding(16, 64),
}
CASES = [
    (name, kind)
    for name in FAMILIES
    for kind in LAYERS
    if kind != "embedding" or not name.startswith(("oft", "boft"))  # refused by name, merged or beside
]
MODULES = ("embedding", "linear", "second", "conv")
"""What is merged of `Mixed`."""


def holder_of(layer: nn.Module, dtype: torch.dtype) -> Holder:
    layer.weight.data.copy_(BASE_STD * torch.randn(layer.weight.shape, generator=generator(4)))
    return Holder(layer.to(dtype))


def item(made: Family, strength: float = 1.0) -> tuple[str, dict[str, object], float]:
    return "file", {"layer.weight": made.adapter}, strength


def assert_rounded_once(weight: Tensor, exact: Tensor) -> None:
    """At most half a unit in the last place of its type, and 1e-6 for fp32 arithmetic, element by element.

    The sum of a few terms may cancel: 1e-6 is relative to the largest element.
    """
    info = torch.finfo(weight.dtype)
    half_unit = 0.5 * info.eps * exact.abs().clamp_min(info.tiny)
    assert bool(((weight.double() - exact).abs() <= half_unit + 1e-6 * exact.abs().max()).all())


@MERGED_TYPES
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_family_on_every_layer_is_one_rounding_of_the_float64_merge(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    holder = holder_of(LAYERS[kind](), dtype)
    original = holder.layer.weight
    made = family(name, tuple(original.shape))
    base = original.detach().double()
    bytes_before = image_of(holder)
    with PatchSession(holder) as session:
        for strength in (1.0, -0.5, 0.7):
            session.apply([item(made, strength)], dense="merge")
            assert session.merged == ("layer",)
            assert hooks_of(holder) == 0
            exact, _ = merge(base, [Step(made.change, strength)])
            assert holder.layer.weight is not original
            assert_rounded_once(holder.layer.weight, exact)
            assert holder.layer.weight.stride() == original.stride()
    assert holder.layer.weight is original
    assert image_of(holder) == bytes_before


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["lora", "dora-out", "ia3-in", "oft", "loha-streamed"])
def test_a_merge_in_many_blocks_is_the_same(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "embedding":
        name = name.replace("oft", "glora")
    holder = holder_of(LAYERS[kind](), torch.float32)
    item_of_layer = item(family(name, tuple(holder.layer.weight.shape)))
    with PatchSession(holder) as session:
        session.apply([item_of_layer], dense="merge")
        whole = holder.layer.weight.clone()
        session.clear()
        monkeypatch.setattr("lib_precision_lora.branch.reading.BLOCK_BYTES", 4 * 160)
        session.apply([item_of_layer], dense="merge")
        torch.testing.assert_close(holder.layer.weight.detach(), whole, rtol=1e-6, atol=1e-7)


@MERGED_TYPES
def test_a_stack_is_merged_in_prompt_order(dtype: torch.dtype) -> None:
    holder = holder_of(nn.Linear(64, 16), dtype)
    base = holder.layer.weight.detach().double()
    made = [
        family(name, (16, 64), seed) for seed, name in enumerate(("lora", "dora-out", "lokr-both", "ia3-out"))
    ]
    with PatchSession(holder) as session:
        for order in (made, made[::-1]):
            session.apply([(f"{n}", item(one)[1], 0.7) for n, one in enumerate(order)], dense="merge")
            exact, _ = merge(base, [Step(one.change, 0.7) for one in order])
            assert_rounded_once(holder.layer.weight, exact)


@MERGED_TYPES
def test_a_forward_is_that_of_the_layer_with_the_rounded_weight(dtype: torch.dtype) -> None:
    holder = holder_of(nn.Linear(64, 16), dtype)
    made, delta = family("lora", (16, 64)), torch.linspace(-1.0, 1.0, 16)
    x = noise((5, 64), generator(2)).to(dtype)
    weight, _ = merge(holder.layer.weight.detach(), [Step(made.change, 1.0)])
    bias = (holder.layer.bias.detach().double() + delta.double()).to(dtype)
    expected = torch.nn.functional.linear(x, weight.to(dtype), bias)
    with PatchSession(holder) as session:
        session.apply([item(made), ("bias", {"layer.bias": Diff(delta)}, 1.0)], dense="merge")
        assert hooks_of(holder) == 0
        torch.testing.assert_close(holder.layer.bias, bias, rtol=0, atol=0)
        torch.testing.assert_close(
            holder(x), expected, rtol=2e-6, atol=1e-3 if dtype == torch.float16 else 1e-6
        )


@pytest.mark.parametrize("stored", ["dense-bf16", "fp8-e4m3fn", "bnb-nf4", "gguf-Q8_0", "gguf-Q4_0"])
def test_bf16_and_low_bit_layers_are_never_merged(stored: str) -> None:
    holder, _ = stored_holder(stored, noise((16, 256), generator(1)))
    original = holder.layer.weight
    with PatchSession(holder) as session:
        for name in ("lora", "diff"):
            session.apply([item(family(name, (16, 256)))], dense="merge")
            assert (session.merged, session.attached) == ((), ("layer",))
            assert holder.layer.weight is original


def test_a_weight_that_stands_at_two_places_is_not_merged() -> None:
    model = Mixed()
    model.register_module("other", nn.Module())
    model.other.weight = model.linear.weight
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight", "second.weight"]), dense="merge")
        assert session.merged == ("second",)
        assert model.linear.weight is model.other.weight


def test_a_module_that_stands_at_two_places_is_not_merged_twice() -> None:
    model = Mixed()
    before = image_of(model)
    model.other = model.linear
    adapter = files_on(["linear.weight"])[0][1]["linear.weight"]
    items = [("file", {"linear.weight": adapter, "other.weight": adapter}, 1.0)]
    with PatchSession(model) as session:
        session.apply(items, "fp32")
        beside = outputs(model)
        session.apply(items, "fp32", "merge")
        assert session.merged == ()
        assert torch.equal(outputs(model), beside)
    assert image_of(model) == before


class Fetched(nn.Parameter):
    """A host's own parameter class, which decides by itself how it moves."""


def test_a_parameter_class_of_the_host_is_not_merged() -> None:
    model = Mixed()
    model.linear.weight = Fetched(model.linear.weight.detach(), requires_grad=False)
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight"]), dense="merge")
        assert (session.merged, session.attached) == ((), ("linear",))


@pytest.mark.parametrize("former", [0.0, 1.0], ids=["at once", "after a change of strength"])
def test_a_sum_beyond_fp16_runs_beside_its_weight(former: float) -> None:
    """Law 3: merged it would be inf; the branch is finite, and so is the sum of the outputs."""
    holder = holder_of(nn.Linear(8, 4), torch.float16)
    original = holder.layer.weight
    delta = torch.zeros(4, 8)
    delta[1, 2] = 60000.0
    x = torch.full((1, 8), 0.01, dtype=torch.float16)
    with PatchSession(holder) as session:
        if former:
            session.apply([("file", {"layer.weight": Diff(delta)}, former)], dense="merge")
            assert session.merged == ("layer",)
        session.apply([("file", {"layer.weight": Diff(delta)}, 1.5)], dense="merge")
        assert (session.merged, session.attached) == ((), ("layer",))
        assert holder.layer.weight is original
        exact = x.double() @ (original.double() + 1.5 * delta.double()).T + holder.layer.bias.double()
        torch.testing.assert_close(holder(x).double(), exact, rtol=2e-3, atol=1e-3)
        session.apply([("file", {"layer.weight": Diff(delta)}, 0.5)], dense="merge")
        assert session.merged == ("layer",)
        assert float(holder.layer.weight[1, 2]) == pytest.approx(30000.0, rel=1e-3)


def test_automatic_merges_only_where_a_branch_would_cost_more_than_a_quarter() -> None:
    """r · (in + out) > in · out / 4: from rank 32 on at 256 × 256."""
    assert SMALL_LAYER == 256 * 256
    up, down = noise((256, 64), generator(1), 0.01), noise((64, 256), generator(2), 0.01)

    def merged_with(layer: nn.Module, adapter: object, dtype: torch.dtype = torch.float16) -> bool:
        holder = Holder(layer.to(dtype))
        with PatchSession(holder) as session:
            session.apply([("file", {"layer.weight": adapter}, 1.0)], dense="auto")
            return session.merged == ("layer",)

    def of_rank(rank: int) -> object:
        tensors = {
            "layer.lora_up.weight": up[:, :rank].clone(),
            "layer.lora_down.weight": down[:rank].clone(),
        }
        return read_adapters(tensors)["layer"]

    assert not merged_with(nn.Linear(256, 256), of_rank(32))
    assert merged_with(nn.Linear(256, 256), of_rank(33))
    assert merged_with(nn.Linear(256, 256), of_rank(33), torch.float32)
    assert not merged_with(nn.Linear(256, 256), of_rank(64), torch.bfloat16)
    assert not merged_with(nn.Embedding(256, 256), of_rank(64))
    assert merged_with(nn.Linear(256, 256), Diff(torch.ones(256, 256)))
    assert not merged_with(nn.Linear(256, 255), Diff(torch.ones(255, 256)))
    assert merged_with(nn.Linear(256, 256), family("ia3-in", (256, 256)).adapter), "one more pass"
    assert not merged_with(nn.Linear(256, 256), family("dora-out", (256, 256)).adapter)


def test_the_default_merges_nothing() -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        assert session.merged == ()
        session.apply(EVERYTHING, dense="merge")
        assert set(session.merged) == set(MODULES)


def test_a_change_of_policy_exchanges_merges_and_branches() -> None:
    model = Mixed()
    before, plain = image_of(model), outputs(model)
    with PatchSession(model) as session:
        session.apply(EVERYTHING)
        beside = outputs(model)
        for dense in ("merge", "branch", "merge", "merge"):
            session.apply(EVERYTHING, dense=dense)
            torch.testing.assert_close(outputs(model), beside, rtol=1e-5, atol=1e-6)
            kept = {name for name, image in image_of(model).items() if image == before[name]}
            expected = (
                {f"{name}.{end}" for name in MODULES for end in ("weight", "bias")}
                if dense == "merge"
                else set()
            )
            assert set(before) - kept == (expected & set(before)) | {"register"}
    assert image_of(model) == before
    assert torch.equal(outputs(model), plain)


def test_a_change_of_strength_writes_into_the_standing_parameter_and_reads_only_what_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Mixed()
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight", "conv.weight"]), dense="merge")
        standing = model.linear.weight, model.linear.weight.data_ptr()
        written: list[Tensor] = []
        write = merged.write_merged
        monkeypatch.setattr(
            merged, "write_merged", lambda target, *rest: (written.append(target), write(target, *rest))
        )
        session.apply(files_on(["linear.weight", "conv.weight"]), dense="merge")
        assert written == []
        session.apply(files_on(["linear.weight"], 0.5) + files_on(["conv.weight"]), dense="merge")
        assert [target.data_ptr() for target in written] == [standing[1]]
        assert (model.linear.weight, model.linear.weight.data_ptr()) == standing
        fresh = Mixed()
        with PatchSession(fresh) as other:
            other.apply(files_on(["linear.weight"], 0.5) + files_on(["conv.weight"]), dense="merge")
            assert torch.equal(outputs(model), outputs(fresh))


def test_two_hundred_cycles_leave_no_trace() -> None:
    model = Mixed()
    before, plain = image_of(model), outputs(model)
    session = PatchSession(model)
    counts = []
    for cycle in range(200):
        session.apply(EVERYTHING if cycle % 3 else files_on(["linear.weight"], kind=cycle % 5), dense="merge")
        assert not torch.equal(outputs(model), plain)
        session.clear()
        assert image_of(model) == before
        if cycle in (50, 199):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert torch.equal(outputs(model), plain)
    assert hooks_of(model) == 0
    assert abs(counts[1] - counts[0]) < 50


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.parametrize("former", [[], FORMER], ids=["nothing attached", "a set attached"])
@pytest.mark.parametrize("wanted", [CHANGED, EVERYTHING, SAME_FACTORS, FEWER])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (session_module, "attach"),
        (merged, "write_merged"),
        (merged, "park"),
        (merged, "stored_weight"),
        (merged, "_give_room"),
        (merged.Merged, "restrength"),
    ],
    ids=["attach", "write", "park", "stored_weight", "room", "restrength"],
)
def test_an_exception_at_any_point_leaves_everything_as_it_was(
    former: Items, wanted: Items, owner: object, name: str, error: type[BaseException]
) -> None:
    model = Mixed()
    untouched = image_of(model)
    session = PatchSession(model)
    if former:
        session.apply(former, dense="merge")
    before = outputs(model), image_of(model), set(session.attached), hooks_of(model)
    for failure in range(1, 40):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), failure, error))
            try:
                session.apply(wanted, dense="merge")
                break
            except error:
                pass
        assert torch.equal(outputs(model), before[0])
        assert (image_of(model), set(session.attached), hooks_of(model)) == before[1:]
    assert failure < 39
    assert (failure > 1) == is_called(name, former, wanted)
    session.clear()
    assert image_of(model) == untouched
    assert hooks_of(model) == 0


def is_called(name: str, former: Items, wanted: Items) -> bool:
    """Whether there is anything to do for it: a change of strength writes into the parameters in place."""
    in_place = bool(former) and wanted is SAME_FACTORS
    return {"park": not in_place, "_give_room": not in_place, "restrength": in_place}.get(name, True)


def test_a_layer_that_finds_no_room_on_its_device_does_not_keep_the_others_from_coming_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Mixed()
    before = image_of(model)
    session = PatchSession(model)
    session.apply(EVERYTHING, dense="merge")
    monkeypatch.setattr(merged.Shadow, "detach", failing_after(merged.Shadow.detach, at=2))
    with pytest.raises(InjectedError):
        session.clear()
    assert session.attached == ()
    assert image_of(model) == before
    assert hooks_of(model) == 0


def failing_after(call: Callable[..., None], at: int) -> Callable[..., None]:
    """The call; its `at`-th raises when it has done its work."""
    count = 0

    def run(*args: object, **kwargs: object) -> None:
        nonlocal count
        count += 1
        call(*args, **kwargs)
        if count == at:
            raise InjectedError

    return run


def test_a_session_that_is_dropped_gives_the_parameters_back() -> None:
    model = Mixed()
    before = image_of(model)
    session = PatchSession(model)
    session.apply(EVERYTHING, dense="merge")
    assert image_of(model) != before
    del session
    gc.collect()
    assert image_of(model) == before


def test_the_original_comes_back_as_the_host_has_cast_the_layer_meanwhile() -> None:
    model, alone = Mixed(), Mixed()
    original = model.linear.weight
    with PatchSession(model) as session:
        session.apply(files_on(["linear.weight", "linear.bias"]), dense="merge")
        model.to(torch.float64)
        alone.to(torch.float64)
    assert model.linear.weight is original
    assert [value for _, value in image_of(model).values()] == [
        value for _, value in image_of(alone).values()
    ]


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as it is", "cast"])
def test_a_copy_that_the_host_has_made_of_a_merged_parameter_is_no_base(dtype: torch.dtype | None) -> None:
    """A host that swaps layers, or casts them in their forward, makes new parameters of what stands there."""
    model, alone = Mixed(), Mixed()
    plain = model.linear.weight
    session = PatchSession(model)
    for end in (session.clear, lambda: session.apply(files_on(["conv.weight"]), dense="merge")):
        session.apply(files_on(["linear.weight"]), dense="merge")
        for layer in (model.linear, alone.linear):
            copy = layer.weight.detach().clone().to(dtype or layer.weight.dtype)
            layer.weight = nn.Parameter(copy, requires_grad=False)
        end()
        assert model.linear.weight is plain
        assert torch.equal(model.linear.weight, alone.linear.weight)
        assert model.linear.weight.dtype == alone.linear.weight.dtype


def test_a_parameter_that_the_host_has_exchanged_is_the_hosts() -> None:
    model = Mixed()
    session = PatchSession(model)
    session.apply(files_on(["linear.weight"]), dense="merge")
    theirs = model.linear.weight = nn.Parameter(torch.ones(12, 8), requires_grad=False)
    session.apply(files_on(["linear.weight"]), dense="merge")
    assert session.merged == ("linear",)
    assert model.linear.weight is not theirs
    session.clear()
    assert model.linear.weight is theirs
    assert torch.equal(theirs, torch.ones(12, 8))


@pytest.mark.parametrize("made_in", [False, True], ids=["normal model", "model made in inference mode"])
@pytest.mark.parametrize("attached_in", [False, True], ids=["normal", "in inference mode"])
def test_inference_mode_is_the_hosts_to_choose(made_in: bool, attached_in: bool) -> None:
    with torch.inference_mode(made_in):
        model = Mixed()
    before, plain = image_of(model), outputs(model)
    session = PatchSession(model)
    for cast in (False, True):
        with torch.inference_mode(attached_in):
            session.apply(EVERYTHING, dense="merge")
            if cast:
                model.to(torch.float64).to(torch.float32)
        assert not torch.equal(outputs(model), plain)
        with torch.inference_mode(not attached_in):
            session.apply(files_on(["linear.weight"], 0.5), dense="merge")
        assert not torch.equal(outputs(model), plain)
        session.clear()
        assert image_of(model) == before
        assert torch.equal(outputs(model), plain)


def test_a_merge_holds_one_copy_beside_the_original_and_a_block_while_it_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lib_precision_lora.branch.reading.BLOCK_BYTES", 64 * 1024)
    weight = 2 * 512 * 512
    holder = holder_of(nn.Linear(512, 512, bias=False), torch.float16)
    session, made = PatchSession(holder), family("lora", (512, 512))
    full, half = item(made), item(made, 0.5)
    attach = metered(lambda: session.apply([full], dense="merge"))
    assert weight <= attach.peak <= weight + 16 * 64 * 1024
    change = metered(lambda: session.apply([half], dense="merge"))
    assert 0 < change.peak <= 16 * 64 * 1024
    session.clear()
    gc.collect()
    assert attach.alive + change.alive < 64 * 1024


def test_an_original_that_is_kept_elsewhere_leaves_no_copy_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on an accelerator, where its values go to the CPU: whoever still refers to them would keep them."""

    def elsewhere(original: nn.Parameter) -> None:
        original.data = original.data.clone()

    monkeypatch.setattr(merged, "park", elsewhere)
    model = Mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storages = [weakref.ref(getattr(model, name).weight.untyped_storage()) for name in MODULES]
    with PatchSession(model) as session:
        session.apply(EVERYTHING, dense="merge")
        gc.collect()
        assert [storage() for storage in storages] == [None] * len(MODULES)
        session.apply(CHANGED, dense="merge")
        exact = Mixed()
        with PatchSession(exact) as other:
            other.apply(CHANGED, dense="merge")
            assert torch.equal(outputs(model), outputs(exact))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture
def accelerator() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA: run it on a machine with a card")
    return torch.device("cuda")


def test_on_an_accelerator_the_originals_wait_on_the_cpu(accelerator: torch.device) -> None:
    model = Mixed().to(accelerator)
    original = model.linear.weight
    before = original.detach().cpu().clone()
    with PatchSession(model) as session:
        session.apply(EVERYTHING, dense="merge")
        assert original.device.type == "cpu"
        assert model.linear.weight.is_cuda
        model.to("cpu")
        session.apply(CHANGED, dense="merge")
        model.to(accelerator)
    assert model.linear.weight is original
    assert original.is_cuda
    assert torch.equal(original.cpu(), before)


SETS: dict[str, Items] = {
    "former": FORMER,
    "weaker": SAME_FACTORS,
    "changed": CHANGED,
    "fewer": FEWER,
    "all": EVERYTHING,
}


class Lifecycle(RuleBasedStateMachine):
    """Attach, detach, move, cast, copy and fail in any order: in the end the host has what it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.alone = Mixed(), Mixed()
        self.objects = dict(self.model.named_parameters())
        self.session = PatchSession(self.model)
        self.present: tuple[Items, str] | None = None

    @rule(name=st.sampled_from(list(SETS)), dense=st.sampled_from(["merge", "merge", "branch", "auto"]))
    def apply(self, name: str, dense: str) -> None:
        self.session.apply(SETS[name], "fp32", dense)
        self.present = SETS[name], dense

    @rule()
    def clear(self) -> None:
        self.session.clear()
        self.present = None

    @rule()
    def clear_merged(self) -> None:
        self.session.clear_merged()
        assert self.session.merged == ()
        if self.present is not None:
            self.session.apply(self.present[0], "fp32", self.present[1])

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def cast_and_return(self, dtype: torch.dtype) -> None:
        for model in (self.model, self.alone):
            model.to(dtype).to(torch.float32)

    @rule()
    def the_host_copies_a_layer(self) -> None:
        """As it swaps it; where something stands there, the next change sees it."""
        layer = self.model.second
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        if self.present is None or "second" not in self.session.merged:
            self.objects["second.weight"] = layer.weight
        if self.present is not None:
            self.session.apply(self.present[0], "fp32", self.present[1])

    @rule(
        name=st.sampled_from(list(SETS)),
        at=st.integers(1, 6),
        place=st.sampled_from(["write_merged", "park"]),
    )
    def a_failure(self, name: str, at: int, place: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merged, place, failing(getattr(merged, place), at, InjectedError))
            try:
                self.session.apply(SETS[name], "fp32", "merge")
                self.present = SETS[name], "merge"
            except InjectedError:
                pass

    @invariant()
    def the_model_computes_the_present_set(self) -> None:
        fresh = Mixed()
        with PatchSession(fresh) as session:
            if self.present is not None:
                session.apply(self.present[0], "fp32")
            torch.testing.assert_close(outputs(self.model), outputs(fresh), rtol=1e-4, atol=1e-5)

    @invariant()
    def what_is_not_patched_is_the_hosts(self) -> None:
        if self.present is None:
            self.same_as_alone()

    def same_as_alone(self) -> None:
        for name, value in self.model.named_parameters():
            assert value is self.objects[name], name
            assert torch.equal(value, self.alone.get_parameter(name)), name

    def teardown(self) -> None:
        self.session.clear()
        self.same_as_alone()
        assert hooks_of(self.model) == 0


def test_any_sequence_leaves_the_host_what_it_would_have() -> None:
    run_state_machine_as_test(
        Lifecycle,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
