"""Side-by-side measurements; ``python -m benchmarks.run`` does them all and writes ``results/*.json``."""
