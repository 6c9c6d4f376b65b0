"""A selection applied: to a checkpoint on disk, to a live model, and the check that both agree."""
