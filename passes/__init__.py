"""From a joint graph to one whose gradients are private, and proved to be.

| in this order                     | what it does                                                                  |
|-----------------------------------|-------------------------------------------------------------------------------|
| apart/                            | writes fused ops out, so that what follows sees what happens to samples       |
| inputs, capture                   | which input is a parameter, which dimension of which value the samples        |
| batch_axis, axes/                 | for every value how it depends on samples, by a rule for each op; or a refusal |
| points, values, part_outputs      | where samples are added up in a gradient; what a part of a model hands on     |
| plan, groups, cost, price_of_probes, strategies/ | how each norm and sum is computed, and the clipping groups     |
| before, rewrite, emit, mechanism  | the private graph                                                             |
| guarantee, verify/                | proves of it that it gives what the options say, from nothing but the graph   |
| late/                             | behind the proof: memory and launches; what is released does not change       |

`nodes` and `order` are what several of them ask of a graph, `refuse` and `dump` tell people. pipeline.py calls them.
"""
