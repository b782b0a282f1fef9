"""All settings: defined, read strictly, checked. Starts nothing.

Files:
    batch_split   splits a global batch over ranks and forward passes
    command_line  arguments and checks that commands share
    draft         the values of a future config, with their origins and mistakes
    explain       the meaning of each setting, as text and as a schema
    io            YAML and --set to a config and back, absolute paths
    messages      wording of config errors
    paths         ~, $NAME and URLs in settings that name files and folders
    renamed       settings by their former names
    resume        which settings may change when a run is resumed
    sections      the config sections that belong to no other folder
    stages        a run as a row of stages, each with its own config
    strict_yaml   YAML with line numbers and without surprises
    train_config  all sections together, and the rules across them
"""
