"""`steersman tune` (docs/cluster.md).

space       the YAML file: what varies, and how it is searched
folder      what was asked, the table of trials, TensorBoard's HParams
heuristic   a heuristic's numbers, by the search that training and the benchmark use
trial       hyper-parameters and weights of rewards: one point, which learns round by round, and tells what it is worth
tune        all such trials, by Ray Tune: ASHA or PBT, resumption
"""
