"""All measurements, one after the other."""

from __future__ import annotations

from benchmarks import demo_quality, pruning_io, shape_values, tracing_overhead


def main() -> None:
    """Measure and write everything."""
    for benchmark in (shape_values, tracing_overhead, pruning_io, demo_quality):
        benchmark.main()


if __name__ == "__main__":
    main()
