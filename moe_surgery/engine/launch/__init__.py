"""In the user's process: hooking in, starting commands and engines, and asking what their processes did.

Takes what the user asked for; gives orders in the environment, and afterwards the receipts. It sees no vLLM model.
"""
