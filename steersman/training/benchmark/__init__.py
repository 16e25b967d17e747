"""The benchmark: scenarios from files, tuned heuristics and learned policies, held-out episodes, one report.

The modules, in the order of the data (docs/benchmark.md):

    plan        what was asked for, checked
    scenario    what is played: a file in configs/benchmarks
    folder      where results go: every finished part is a file, and none is done twice
    budget      how much is tuned, learned and played
    tuning      what heuristics are tuned by, as files for `steersman tune`
    learning    the learned policy
    contenders  the policies that compete
    play        episodes into counts
    counts      the table of counts, and what is computed from it
    capacity    the SLO capacity, and intervals
    figures     what a scenario came to: the numbers of every report
    benchmark   all of it, top to bottom
    tables, plain, page, charts, board    the terminal, JSON, the HTML page, its pictures, TensorBoard
"""
