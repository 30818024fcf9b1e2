"""How layers compute their low-bit weights; here none does by itself."""
