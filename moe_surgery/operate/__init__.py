"""Operating: a plan carried out as one transaction, and taken back.

Takes a live model and a plan; gives a report. Every block is built and proven beside the model before any is exchanged;
a failure at any point leaves the model as it was.
"""
