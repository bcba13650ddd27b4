"""Behind the proof, on the graphs of forward and backward, when Inductor has simplified them (run.py has the order).

No pass here changes what is released, except by rounding: which values are noised, with which key, stream and
deviation, and which samples are clipped to what, was proved and stays. They decide when and in how many launches things
are computed, and what is held meanwhile. `memory` says how much that is, `windows` which launches may become one, and
`norms` how norms are written in a graph.
"""
