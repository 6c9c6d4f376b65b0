"""How quantised weights become plain ones: one module per method, each of which registers itself."""
