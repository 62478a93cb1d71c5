"""An exported folder on the Hub: one commit, which the next one of the same folder leaves as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from drafttrain.core.errors import UserError, first_line
from drafttrain.export.native import write_custom_generate

CARD = "README.md"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DENIED = (401, 403)


@dataclass(frozen=True)
class Upload:
    """What goes where."""

    folder: Path
    repo: str
    private: bool = False
    revision: str | None = None
    endpoint: str | None = None
    """The Hub's address; by default huggingface_hub's own (HF_ENDPOINT)."""
    token: str | None = None

    def files(self) -> list[Path]:
        """Every file of the folder; a `UserError` for a pickle, which can run code where it is loaded."""
        found = sorted(path for path in self.folder.rglob("*") if path.is_file())
        for path in found:
            if path.suffix in PICKLES and path.name != "openvino_model.bin":
                raise UserError(f"'{path}' is a pickle, and none is published; export the drafter again")
        if not found:
            raise UserError(f"'{self.folder}': nothing to upload; export the drafter first")
        return found


def checked_card(folder: Path) -> dict[str, Any]:
    """The metadata of the folder's card, as huggingface_hub reads it; a `UserError` where it cannot."""
    try:
        return ModelCard.load(folder / CARD).data.to_dict()
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder / CARD}': no valid model card ({first_line(error)}); export the drafter again") from error


def plan_text(upload: Upload) -> str:
    """What `--dry-run` prints: the files with their sizes, and the card's metadata."""
    lines = [f"would upload to {upload.repo}{f' at {upload.revision}' if upload.revision else ''}{' (private)' if upload.private else ''}:"]
    lines += [f"  {path.relative_to(upload.folder)}  {path.stat().st_size:,} bytes" for path in upload.files()]
    lines += [f"  {key}: {value}" for key, value in checked_card(upload.folder).items()]
    return "\n".join(lines)


def push(upload: Upload) -> str:
    """Makes the repository where there is none, and commits the folder; the commit's address.

    What an interrupted upload has sent is not sent again: large files are asked for by their hash. Raises `UserError` for a repository
    without rights, a wrong name, and a Hub that cannot be reached.
    """
    check_name(upload.repo)
    checked_card(upload.folder)
    if (upload.folder / "custom_generate").is_dir():
        write_custom_generate(upload.folder, upload.repo)
    operations = [CommitOperationAdd(path.relative_to(upload.folder).as_posix(), path) for path in upload.files()]
    api = HfApi(endpoint=upload.endpoint, token=upload.token)
    try:
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        if upload.revision is not None:
            api.create_branch(upload.repo, branch=upload.revision, exist_ok=True)
        done = api.create_commit(upload.repo, operations, commit_message="Upload drafter", revision=upload.revision)
    except LocalTokenNotFoundError as error:
        raise UserError(f"Hub repository '{upload.repo}': nobody is logged in; run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        raise UserError(f"Hub repository '{upload.repo}': {_refusal(error)}") from error
    except (OSError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"Hub repository '{upload.repo}': the upload stopped ({reason}); run it again, what was sent is kept") from error
    return str(done.commit_url)


def check_name(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--repo '{repo}': no name of a Hub repository ({first_line(error)}); give user/name") from error
    if "/" not in repo:
        raise UserError(f"--repo '{repo}': whose? give user/name")


def _refusal(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status in DENIED:
        return f"you have no right to write there (HTTP {status}); check the name, and that the token has the role `write`"
    return f"the Hub answered with HTTP {status} ({first_line(error)}); run it again, what was sent is kept"
