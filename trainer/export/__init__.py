"""A trained model as files that other programs load without this project.

Files:
    card      the README.md of an exported model: what is known of it, and what is not
    command   python -m trainer.export
    programs  the generator and the whole sampling loop as graphs of torch.export
"""
