"""How good a pruned model is: quality, generation health, memory and speed, beside the dense model."""
