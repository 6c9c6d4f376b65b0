"""Reports for people: the model card of a pruned checkpoint, and the HTML report."""
