"""Reading: from a block to what it computes, a :class:`~moe_surgery.spec.MoESpec`, or the reason why not.

Three steps, a folder each: a run is recorded (``record``), the record gets a meaning (``meaning``), and the meaning is
parsed into a spec (``parse``). ``block.py`` does all three for a whole block, ``experts.py`` for a module of routed
experts alone. Takes a module; gives a :class:`~moe_surgery.read.reading.Reading`. It may not look at names or classes
to decide what something computes, may not touch a weight's values, and leaves no trace.
"""
