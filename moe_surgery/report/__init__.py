"""Reporting: what happened to every MoE-looking site, as values, as text, as JSON and as a picture.

Takes outcomes; gives text and files. It may not look at a model, and the same outcomes always give the same text.
"""
