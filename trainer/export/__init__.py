"""A trained model as files that other programs load without this project.

Files:
    card              the README.md of an exported model: what is known of it, and what is not
    command           python -m trainer.export
    diffusers_folder  a folder that diffusers loads
    forms             the forms by name: what each writes, needs and says in the card
    hub               sends the folder to the Hugging Face Hub
    onnx_graphs       the generator and the denoising loop as ONNX
    portable/         the files of such a folder, which draw without this project
    programs          the generator and the whole sampling loop as graphs of torch.export
"""
