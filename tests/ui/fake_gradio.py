"""As much of gradio as the accordion uses: components remember how they were made and wired."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType, TracebackType
from typing import Any


@dataclass(eq=False)
class Component:
    """kind: its class in gradio; value and options: as given; clicks: the keywords of each handler."""

    kind: str
    value: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    clicks: list[dict[str, Any]] = field(default_factory=list)
    parents: tuple[Component, ...] = ()

    def click(self, fn: Any, **options: Any) -> None:
        self.clicks.append({"fn": fn, **options})


class FakeGradio(ModuleType):
    """Takes gradio's place. made: every component, in order."""

    def __init__(self) -> None:
        super().__init__("gradio")
        self.made: list[Component] = []
        self._open: list[Component] = []

    def make(self, kind: str, value: Any = None, **options: Any) -> Component:
        options.setdefault("value", value)
        component = Layout(kind, options["value"], options, [], tuple(self._open))
        component.gradio = self
        self.made.append(component)
        return component

    def __getattr__(self, kind: str) -> Any:
        if kind.startswith("_"):
            raise AttributeError(kind)
        return lambda value=None, **options: self.make(kind, value, **options)


@dataclass(eq=False)
class Layout(Component):
    """What holds others in its `with` block."""

    gradio: FakeGradio | None = None

    def __enter__(self) -> Layout:
        assert self.gradio is not None
        self.gradio._open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.gradio is not None
        self.gradio._open.pop()
