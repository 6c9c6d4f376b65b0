"""The grid of many jobs from one YAML file: models, calibration sets, methods and keep rates, judged alike."""
