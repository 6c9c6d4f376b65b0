"""What an MoE layer is: facts per family, the shape of a model, tensor names on disk, sites in a live model."""
