"""The repair without training: the kept experts' down projections solved again by least squares."""
