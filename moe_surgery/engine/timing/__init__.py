"""Timing two whole engines, with and without surgery, each in a process of its own."""
