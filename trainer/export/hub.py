"""Sends an exported folder to the Hugging Face Hub, through its own client."""

import os
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

from data.storage.errors import OperationError, UserError


def check_hub(name: str) -> None:
    """Refuse before any work is done.

    Args:
        name: OWNER/NAME of the repository.

    Raises:
        UserError: the name is no repository's, the client is not installed, or nobody is logged in.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise UserError(f"--push is {name}, but a repository has the form OWNER/NAME")
    if find_spec("huggingface_hub") is None:
        raise UserError(
            "--push needs huggingface_hub, which this Python does not have: install the extra export, "
            "pip install '.[export]'"
        )
    from huggingface_hub import get_token

    if not get_token():
        raise UserError("--push needs a token of the Hugging Face Hub: set HF_TOKEN, or log in with: hf auth login")


def push(folder: Path, name: str) -> str:
    """Upload a folder as one commit; a repository that does not exist is made, and is private.

    Args:
        folder: what `export` wrote.
        name: OWNER/NAME of the repository.

    Returns:
        Address of the repository.

    Raises:
        OperationError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None and not os.isatty(2):
        disable_progress_bars()
    api = HfApi()
    try:
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload the exported model")
    except (OSError, HTTPError, HFValidationError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        again = shlex.join(["hf", "upload", "--private", name, str(folder)])
        raise OperationError(f"{folder} is written, but not sent to {name}: {reason}. To try again: {again}") from None
    return str(address)
