"""Measurements that only a GPU of true size can show."""
