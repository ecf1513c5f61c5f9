"""Texts out of models: a call's options and prompts, checked (:mod:`.call`); how search and model take turns
(:mod:`.strategies`) over a cache (:mod:`.decoder`); what comes out (:mod:`.generate`). Masked models have a way of
their own (:mod:`.masked`). The search itself is ``rust/search``."""
