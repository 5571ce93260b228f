"""What is installed: the versions that a plan or report was made with, and importing large libraries.

Takes nothing of this library and knows nothing of models.
"""
