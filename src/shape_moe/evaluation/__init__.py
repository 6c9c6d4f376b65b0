"""What pruning costs: quality beside the dense model, generation health, memory and speed."""
