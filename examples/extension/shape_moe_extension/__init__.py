"""An example: a statistic, a scorer and a rule for shape-moe."""
