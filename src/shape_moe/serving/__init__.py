"""How the world loads a pruned checkpoint."""
