"""In the process that builds a model: one model's surgery between its building, its loading and its first request.

Takes orders and the model that vLLM built; gives an operated model and a receipt. ``seam.py`` is where vLLM's calls
come in, ``surgery.py`` what is done at each of them.
"""
