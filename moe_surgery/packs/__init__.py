"""Rule packs: which blocks are to be replaced, as data that is never executed.

Takes TOML files, readings and a checkpoint's config; gives :class:`~moe_surgery.packs.match.Match` or
:class:`~moe_surgery.packs.match.Miss`, clause by clause, and the smallest edit that would make a rule match. It
reads no block and may not touch a model.
"""
