"""Backward, reduction, update: who computes a step. Knows no config.

Files:
    compiled   forward passes compiled for a GPU
    guard      whether an update is made
    interface  what an engine is: backward, step, its share of the state
    plain      plain torch, the twin that DeepSpeed is checked against; Adam; a stand-in for a missing network
    ranks      rank arithmetic and small collectives
    zero       DeepSpeed at ZeRO 0 to 3, and the choice of an engine
"""
