"""The demo: a small transformer in six stored weights, a LoRA beside each and merged into each.

Needs the packages `gguf` and `bitsandbytes`, which write and read those files.
"""

from lib_precision_lora.report.demo.result import DemoResult, Ours, Row, Stock
from lib_precision_lora.report.demo.run import run_demo
from lib_precision_lora.report.demo.weights import DemoShape

__all__ = ["DemoResult", "DemoShape", "Ours", "Row", "Stock", "run_demo"]
