"""Reports for people: the model card of a pruned checkpoint."""
