"""Where models are built and loaded by others: the only part of the library that touches global state.

``launch`` runs in the user's process, ``model`` in the process that builds the model, ``timing`` compares two engines.
``orders.py`` says what was asked for and ``receipts.py`` what was done: all that passes between the processes.
``plugin.py`` is what vLLM calls in each of them, ``cores.py`` what its front end asks of the others.
"""
