"""Labels by a language model, and judges of any label.

``chat`` says what a model is asked and answers; ``endpoint`` and ``local`` are two ways to reach one. ``session`` asks
through the cache and within the budget. ``explain`` makes labels, ``cases`` (from ``windows``) and ``judge`` test
them, ``scoring`` does so for many. ``prompts`` holds every word that is said to a model, ``failures`` notes what got no
label.
"""
