"""Figures of the report: each module computes numbers, and lays them out for Plotly."""
