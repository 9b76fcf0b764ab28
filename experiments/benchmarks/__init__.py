"""Measurements of this machine: `make bench` runs every script of this folder that has a `run`."""
