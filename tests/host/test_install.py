"""Entering a host and leaving it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from lib_precision_lora.host import install, uninstall
from lib_precision_lora.host.contract import Requirement
from lib_precision_lora.host.forge.requirements import REQUIREMENTS as FORGE
from lib_precision_lora.host.neo.requirements import REQUIREMENTS as NEO
from tests.double import TOP_LEVEL
from tests.host.checkpoints import Checkpoint
from tests.host.images import distance, generate, load_checkpoint
from tests.host.lora_files import Active, exact_output, make_lora, prompt
from tests.host.observers import bases_of, hooks_of, log_lines, swapped
from tests.host.webui import Host

BY_NAME = {
    host: {str(requirement): requirement for requirement in requirements}
    for host, requirements in (("forge", FORGE), ("neo", NEO))
}
NAMES = list(dict.fromkeys(name for names in BY_NAME.values() for name in names))
FUNCTIONS = list(dict.fromkeys(str(each) for each in (*FORGE, *NEO) if each.parameters))
CALLED = list(dict.fromkeys(str(each) for each in (*FORGE, *NEO) if each.called))
MODULES = sorted({requirement.module for requirement in (*FORGE, *NEO)})


def required(host: Host, name: str) -> Requirement:
    """What this host must have of this name; the test is skipped where it need not."""
    if name not in BY_NAME[host.name]:
        pytest.skip("this host need not have that: the other one must")
    return BY_NAME[host.name][name]


def owner_of(requirement: Requirement) -> tuple[Any, str]:
    """The module or class, and the attribute, that a requirement is about."""
    owner: Any = sys.modules[requirement.module]
    *path, name = requirement.path.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def remove(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Take the name away, from an object's class where it stands there."""
    if name in vars(owner):
        patch.delattr(owner, name)
    else:
        patch.delattr(type(owner), name)


def wrap(function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """As other extensions do it."""

    @functools.wraps(function)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return theirs


def assert_stock(host: Host, before: dict[str, Any]) -> None:
    """Nothing is swapped, and LoRAs are merged as without us."""
    assert all(found is before[name] for name, found in swapped(host).items())
    checkpoint = load_checkpoint(host, lambda: Checkpoint(host))
    lora = make_lora("cats")
    lora.write(host)
    stock = exact_output(checkpoint, "a cat", [Active(lora)], stored=True)
    assert distance(generate(host, prompt("a cat", Active(lora))), stock) < 1e-5
    assert hooks_of(checkpoint.model) == 0


def test_install_twice_swaps_once(bare_host: Host) -> None:
    before = swapped(bare_host)
    try:
        assert install()
        ours = swapped(bare_host)
        assert all(ours[name] is not before[name] for name in before)
        assert install()
        assert all(swapped(bare_host)[name] is ours[name] for name in ours)
    finally:
        uninstall()
    assert all(swapped(bare_host)[name] is before[name] for name in before)
    uninstall()
    assert all(swapped(bare_host)[name] is before[name] for name in before)


def test_uninstall_leaves_every_parameter_the_same_object(bare_host: Host) -> None:
    checkpoint = load_checkpoint(bare_host, lambda: Checkpoint(bare_host))
    base = bases_of(checkpoint)
    lora = make_lora("cats")
    lora.write(bare_host)
    before = swapped(bare_host)
    install()
    generate(bare_host, prompt("a cat", Active(lora)))
    assert hooks_of(checkpoint.model) > 0
    uninstall()
    assert hooks_of(checkpoint.model) == hooks_of(checkpoint.encoder) == 0
    assert bases_of(checkpoint) == base
    assert_stock(bare_host, before)


def test_after_uninstall_the_same_prompt_is_stock_at_once(bare_host: Host) -> None:
    checkpoint = load_checkpoint(bare_host, lambda: Checkpoint(bare_host))
    lora = make_lora("cats")
    lora.write(bare_host)
    install()
    generate(bare_host, prompt("a cat", Active(lora)))
    uninstall()
    image = generate(bare_host, prompt("a cat", Active(lora)))
    assert distance(image, exact_output(checkpoint, "a cat", [Active(lora)], stored=True)) < 1e-5


def test_a_wrapper_around_ours_stays_and_passes_through(bare_host: Host) -> None:
    host = bare_host
    before = swapped(host)
    owners = {name: owner for name, (owner, _) in host.contract.swapped.items()}
    calls: list[str] = []
    install()
    theirs = {name: wrap(function, calls) for name, function in swapped(host).items()}
    for name, function in theirs.items():
        setattr(owners[name], name, function)
    try:
        uninstall()
        assert all(swapped(host)[name] is theirs[name] for name in theirs)
        assert_stock(host, theirs)
        host.memory.unload_all_models()
        assert set(calls) == set(theirs)
        assert install(), "entering again is possible around their wrappers"
        uninstall()
        assert all(swapped(host)[name] is theirs[name] for name in theirs)
    finally:
        for name, function in before.items():
            setattr(owners[name], name, function)


@pytest.mark.parametrize("missing", NAMES)
def test_a_host_without_one_name_keeps_working_without_us(
    bare_host: Host, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = swapped(bare_host)
    owner, name = owner_of(required(bare_host, missing))
    swaps = bare_host.contract.swapped
    with monkeypatch.context() as patch, log_lines() as lines:
        remove(patch, owner, name)
        assert not install()
        present = {key: getattr(owner, name, None) for key, (owner, name) in swaps.items()}
    assert len(lines) == 1
    assert missing in lines[0]
    assert all(found is before[key] for key, found in present.items() if found is not None)
    assert_stock(bare_host, before)


@pytest.mark.parametrize("changed", FUNCTIONS)
def test_a_host_with_another_signature_keeps_working_without_us(
    bare_host: Host, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = swapped(bare_host)
    owner, name = owner_of(required(bare_host, changed))
    with monkeypatch.context() as patch, log_lines() as lines:
        patch.setattr(owner, name, lambda *, surprising: None)
        assert not install()
    assert len(lines) == 1
    assert changed in lines[0]
    assert_stock(bare_host, before)


@pytest.mark.parametrize("changed", CALLED)
def test_what_is_only_called_may_name_its_arguments_otherwise(
    bare_host: Host, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirement = required(bare_host, changed)
    if not requirement.called:
        pytest.skip("this host must have it with these names")
    owner, name = owner_of(requirement)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda first, second=None, *, third=None: None)
        assert requirement.failure() is None
        patch.setattr(owner, name, lambda first, second, third, fourth: None)
        assert requirement.failure() is not None


@pytest.mark.parametrize("module", MODULES)
def test_a_host_without_a_whole_module_keeps_working_without_us(
    bare_host: Host, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if all(requirement.module != module for requirement in BY_NAME[bare_host.name].values()):
        pytest.skip("this host need not have that: the other one must")
    before = swapped(bare_host)
    with monkeypatch.context() as patch, log_lines() as lines:
        patch.setitem(sys.modules, module, None)
        assert not install()
    assert len(lines) == 1
    assert module in lines[0]
    assert_stock(bare_host, before)


def test_a_plain_wrapper_of_another_extension_is_no_reason_to_stay_away(
    bare_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs tells nothing about its parameters, so it passes on what it gets."""
    stock = bare_host.networks.load_networks
    monkeypatch.setattr(bare_host.networks, "load_networks", lambda *args, **kwargs: stock(*args, **kwargs))
    assert install()
    uninstall()


def test_an_unknown_program_is_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOP_LEVEL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "networks", ModuleType("networks"))
    with log_lines() as lines:
        assert not install()
    assert len(lines) == 1
