"""Entry point for the WebUI: registers settings, binding, accordion, axes and API; no logic."""

from modules import script_callbacks, scripts

from lib_precision_lora.host import install
from lib_precision_lora.host.generation.infotext import warn_of_what_is_not_pasted
from lib_precision_lora.host.logs import set_up_logging
from lib_precision_lora.host.page import script as steps

set_up_logging()
# few, since the WebUI goes through its whole stack, and the source of each caller, at each of them
script_callbacks.on_before_ui(steps.prepare_ui)
script_callbacks.on_app_started(steps.prepare_app)
script_callbacks.on_infotext_pasted(warn_of_what_is_not_pasted)
script_callbacks.on_script_unloaded(steps.leave)
install()


class PrecisionLoRA(scripts.Script):
    """The accordion, and the steps of a generation."""

    def title(self):
        return "Precision LoRA"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return steps.make_ui(self)

    def before_process(self, p, *args):
        steps.request_override(p, args)

    def before_process_batch(self, p, *args, **kwargs):
        steps.begin_batch(p)

    def process_before_every_sampling(self, p, *args, **kwargs):
        steps.show_notices(p)
        steps.write_parameters(p)

    def post_sample(self, p, *args):
        steps.show_notices(p)
        steps.write_parameters(p)

    def postprocess(self, p, processed, *args):
        steps.show_late_notices(p, processed)
        steps.report(p)
