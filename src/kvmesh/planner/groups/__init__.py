"""Groups of accelerators that hold the model and compute a phase: how fast they are, and how requests flow among them.

timing      seconds and rates of one group, from the latencies of its shards
waiting     the share of requests that meet an SLO at a rate, from queueing formulas
routing     which group prefills and which decodes a request: a transportation program
phases      the best phase of every group at once, by an integer program
pools       alike groups as one, and groups in parts
lending     time of shards that hold the layers another group lacks
deduction   the best tensor and pipeline parallelism for a set of accelerators
neighbours  moves from one partition into groups to the next: flip, split, merge, move
search      tabu search over partitions
judge       the independent check of a plan
outcome     a partition turned into a plan
"""
