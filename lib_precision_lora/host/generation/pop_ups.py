"""What gradio shows in a corner of the page: it takes HTML, so that a message is made text here."""

from __future__ import annotations

from lib_precision_lora.plain_text import page_text


def pop_up(message: str, serious: bool = True) -> None:
    """Show a message in the page that asked for what is being done."""
    import gradio

    (gradio.Warning if serious else gradio.Info)(_text(message))


def page_error(message: str) -> Exception:
    """An exception that the page shows."""
    import gradio

    error: Exception = gradio.Error(_text(message))
    return error


def page_waits() -> bool:
    """Whether this runs for a click in the page; elsewhere gradio would print what it is told."""
    try:
        from gradio.context import LocalContext
    except ImportError:
        return False
    return LocalContext.blocks.get() is not None and LocalContext.event_id.get() is not None


def _text(message: str) -> str:
    return f"Precision LoRA: {page_text(message)}"
