"""Planning: what is to be done with every site, decided before anything is touched.

Takes a model's sites, packs and a target; gives a :class:`~moe_surgery.planning.plan.Plan`, which can be saved,
reviewed and carried out unchanged. It builds nothing.
"""
