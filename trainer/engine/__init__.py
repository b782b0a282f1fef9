"""Engines: backward pass, gradient reduction, optimizer update. Independent of the config of a run.

Files:
    compile_cache  the folder of compiled code, and which rank compiles
    compiled    forward passes compiled for a GPU
    frozen      frozen parameters
    guard       decides whether to skip an update
    interface   the interface of an engine: backward, step, its share of the state
    messages    values that ranks send to one another, without pickle
    plain       the plain torch engine, the reference for DeepSpeed; Adam and its state
    precision   number types: what a device has, TF32 on or off
    ranks       rank arithmetic and small collectives
    reduction   averages gradients in buckets during the backward pass
    rendezvous  how ranks find one another and prove that they belong to the job
    zero        the DeepSpeed engine at ZeRO stages 0 to 3, and the choice of an engine
    zero_on_cpu  DeepSpeed imported once, for ranks that are forked
"""
