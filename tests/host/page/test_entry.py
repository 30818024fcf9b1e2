"""What the WebUI's start pays for: few callbacks, and nothing imported that is not needed yet."""

from __future__ import annotations

import html
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from lib_precision_lora.host import installation
from lib_precision_lora.host.page import script as steps
from lib_precision_lora.host.page.settings import OFF, OPTIONS
from tests.host.webui import Host


@pytest.fixture
def entry(bare_host: Host, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many callbacks of each kind the entry registers; those of `before_ui` have been called."""
    pytest.importorskip("gradio")
    from tests.page.host_page import ScriptCallbacks, page_modules
    from tests.page.server import load_extension

    if not bare_host.double:
        pytest.skip("a real WebUI has scripts and callbacks of its own: tests/forge runs it")
    modules = page_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(sys.modules["modules"], name.partition(".")[2], module, raising=False)
    callbacks = modules["modules.script_callbacks"]
    assert isinstance(callbacks, ScriptCallbacks)
    load_extension()
    for prepare in callbacks.registered["before_ui"]:
        prepare()
    return {event: len(registered) for event, registered in callbacks.registered.items()}


def test_the_entry_registers_four_callbacks_and_settings_are_there_with_the_page(
    entry: dict[str, int], bare_host: Host
) -> None:
    assert entry == dict.fromkeys(("before_ui", "app_started", "infotext_pasted", "script_unloaded"), 1)
    assert {option.key for option in OPTIONS} <= bare_host.shared.opts.data_labels.keys()


def test_our_axes_are_there_with_the_page_and_a_script_that_is_unloaded_leaves(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    monkeypatch.setattr(steps, "add_axes", lambda: left.append(False))
    monkeypatch.setattr(steps.installation, "uninstall", lambda: left.append(True))
    steps.prepare_ui()
    steps.leave()
    assert left == [False, True]
    assert installation.active() is not None


@pytest.mark.parametrize("api", [True, False])
def test_routes_are_added_where_the_webui_has_an_api(
    host: Host, monkeypatch: pytest.MonkeyPatch, api: bool
) -> None:
    pytest.importorskip("fastapi")
    from lib_precision_lora.host.page import api as module

    added: list[object] = []
    monkeypatch.setattr(host.shared.cmd_opts, "api", api, raising=False)
    monkeypatch.setattr(module, "add_api", lambda page, app: added.append(app))
    app = object()
    steps.prepare_app(None, app)
    assert added == ([app] if api else [])


def test_the_start_imports_neither_the_api_nor_what_only_it_needs() -> None:
    names = ("binding", "page.script", "generation.infotext", "logs", "page.settings", "page.xyz")
    program = (
        f"import sys, {', '.join(f'lib_precision_lora.host.{name}' for name in names)}; print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "lib_precision_lora.host.page.script" in found.stdout.split()
    unwanted = {"fastapi", "gradio", "pydantic", "lib_precision_lora.host.page.api"}
    assert not unwanted & set(found.stdout.split())


def test_in_an_unknown_webui_page_and_settings_say_that_we_are_off_and_why(
    bare_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ModuleType("modules.options")
    monkeypatch.setattr(
        options,
        "OptionHTML",
        lambda text: SimpleNamespace(text=text, default=text, do_not_save=True),
        raising=False,
    )
    monkeypatch.setitem(sys.modules, "modules.options", options)
    monkeypatch.setattr(steps, "add_axes", lambda: None)
    monkeypatch.delattr(bare_host.memory, "soft_empty_cache")
    assert not installation.install()
    before = set(bare_host.shared.opts.data_labels)
    steps.prepare_ui()
    added = bare_host.shared.opts.data_labels.keys() - before
    assert added == {OFF}, "an option that does nothing"
    sentence = bare_host.shared.opts.data_labels[OFF].text
    assert "soft_empty_cache is missing" in sentence
    assert "neither the Forge nor the Forge Neo" in sentence
    shown: list[str] = []
    accordion = ModuleType("lib_precision_lora.ui.accordion")
    monkeypatch.setattr(accordion, "build_note", shown.append, raising=False)
    monkeypatch.setitem(sys.modules, accordion.__name__, accordion)
    assert steps.make_ui(SimpleNamespace(is_img2img=False)) is None
    assert [html.escape(each) for each in shown] == [sentence]


def test_in_an_unknown_webui_the_api_refuses_our_arguments(
    bare_host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastapi = pytest.importorskip("fastapi")
    from lib_precision_lora.host.page import api as module

    class Api:
        def init_script_args(self, request: Any) -> str:
            return "the host's"

    webui = ModuleType("modules.api.api")
    monkeypatch.setattr(webui, "Api", Api, raising=False)
    monkeypatch.setitem(sys.modules, "modules.api", ModuleType("modules.api"))
    monkeypatch.setitem(sys.modules, "modules.api.api", webui)
    monkeypatch.setattr(bare_host.shared.cmd_opts, "api", True, raising=False)
    monkeypatch.setattr(bare_host.shared.cmd_opts, "api_auth", None, raising=False)
    monkeypatch.delattr(bare_host.memory, "soft_empty_cache")
    assert not installation.install()
    module.add_api(None, fastapi.FastAPI())
    try:
        ours = SimpleNamespace(alwayson_scripts={"precision lora": {"args": [True]}})
        with pytest.raises(fastapi.HTTPException, match="soft_empty_cache is missing"):
            Api().init_script_args(ours)
        assert Api().init_script_args(SimpleNamespace(alwayson_scripts=None)) == "the host's"
    finally:
        module.remove_api()
