"""The embedded model, its tasks, and the demonstration that runs on them."""
