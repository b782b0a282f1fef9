"""Every setting: defined, read strictly, checked, priced. Starts nothing.

Files:
    command_line  arguments and checks that commands share
    cost          FLOPs and memory, counted on the meta device
    explain       what each setting means, as text and as a schema
    io            YAML and --set to a config and back, absolute paths
    messages      plain words for config errors
    plan          the dry run
    renamed       settings by their former names
    resume        what may change when a run is resumed
    sections      the sections of a config that no other folder owns
    strict_yaml   YAML with lines and without surprises
    train_config  all sections together, and the rules between them
"""
