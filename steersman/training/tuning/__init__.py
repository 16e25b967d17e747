"""`steersman tune`: hyper-parameters, weights of rewards and numbers of heuristics, by Ray Tune (docs/cluster.md).

space     the YAML file: what varies, and how it is searched
trial     one point of the space: plays or learns, round by round, and tells what it is worth
tune      all of them: ASHA or PBT, resumption, the table, TensorBoard's HParams
"""
