"""comfy-kitchen's `QuantizedTensor`, in which Forge Neo and ComfyUI keep low-bit weights.

It is recognised by its attributes and decoded by the definition of its format; the package is not needed.
"""
