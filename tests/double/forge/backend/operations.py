"""How layers compute their low-bit weights; here none does by itself."""

from __future__ import annotations

bnb_avaliable = False
