"""A script for a server that fails in the second call of the model, where its box is ticked."""

import gradio as gr
from modules import scripts


class Failing(scripts.Script):
    def title(self):
        return "Failing"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        return [gr.Checkbox(False, label="Fail")]

    def process_before_every_sampling(self, p, fails, **kwargs):
        if not fails:
            return
        calls = []

        def call(apply_model, arguments):
            calls.append(arguments["timestep"])
            if len(calls) == 2:
                raise ValueError("it fails in the middle of sampling")
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        unet = p.sd_model.forge_objects.unet.clone()
        unet.set_model_unet_function_wrapper(call)
        p.sd_model.forge_objects.unet = unet
