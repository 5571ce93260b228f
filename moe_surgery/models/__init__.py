"""Hugging Face models: opening them by name, finding the sites in their module tree, greedy generation.

Takes a directory, a hub id or a live model; gives the model with its config, its sites, its tokens. It decides nothing
about a site, never unpickles, and runs code that a checkpoint brings along only if asked to.
"""
