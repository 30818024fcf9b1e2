"""Entry point for the WebUI: registers settings, binding and the page's messages; no logic."""

from modules import script_callbacks, scripts

from lib_precision_lora.host import install, uninstall
from lib_precision_lora.host.logs import set_up_logging
from lib_precision_lora.host.script import show_late_notices, show_notices
from lib_precision_lora.host.settings import register_settings

set_up_logging()
script_callbacks.on_ui_settings(register_settings)
script_callbacks.on_script_unloaded(uninstall)
install()


class PrecisionLoRA(scripts.Script):
    """Brings what could not be applied to the page and the infotext of its generation."""

    def title(self):
        return "Precision LoRA"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p, *args, **kwargs):
        show_notices(p)

    def post_sample(self, p, *args):
        show_notices(p)

    def postprocess(self, p, processed, *args):
        show_late_notices(p, processed)
