"""Pictures of a report as SVG: which layers, what is in a block, how far errors are from mistakes, where weights go.

Takes values, gives text. Every picture is drawn for a width in CSS pixels, in colours that its page names; alone in a
file it brings its own, for light and dark.
"""
