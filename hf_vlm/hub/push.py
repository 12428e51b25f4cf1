"""Pushing a checkpoint to the Hub: model, processor, card and training record in one commit, or nothing at all.

- The folder is checked before anything is sent. Only the files named here are sent: no pickles, no optimiser state, no
  checkpoints to resume from, no notes. Of weights and code, only what the index and the config name.
- A link to a file outside the folder and outside the Hub's cache is refused: it may be somebody's private file.
- The commit names its parent, so a repository that has changed since then refuses it and no other commit is lost.
- A repository or branch that a push created is removed again if the push fails.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoProcessor, TrainingArguments
from transformers.dynamic_module_utils import get_relative_import_files

from ..checkpoints import load_complete
from ..families import FAMILIES, load_class
from ..paths import is_inside
from ..terminal import printable
from .cards.card import CARD_NAME, card_under_name
from .export import save_with_code

INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[\w.-]+\.safetensors")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
PROCESSOR = (
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
SECOND_TOKENIZER = "qformer_tokenizer"  # the folder of InstructBLIP's Q-Former tokenizer
ABOUT = (CARD_NAME, "LICENSE", "training_record.json", "results.json")
PUSHED = ("config.json", "generation_config.json", *PROCESSOR, *ABOUT)

REASONS = {
    401: "the Hub does not accept the token (401): set HF_TOKEN to a valid one, or run `hf auth login`.",
    403: "the token may not write there (403): use one with write access to it.",
    404: "there is no such repository or organisation, or the token may not see it (404).",
    409: "it exists already, made meanwhile or hidden from this token (409).",
    412: "it has changed since the push began (412): look at its new commits, then push again.",
}
NOT_NOW = "the Hub is not available ({status}): push again later."


class PushError(RuntimeError):
    """A push that failed; its message is one printable line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    with_code: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Pushes the checkpoint in a folder in one commit.

    Args:
        folder: A folder written by `save_pretrained` of a model and its processor. README.md, training_record.json and
            results.json are pushed too if present; other files are not.
        repo_id: `org/name`, or a name in the token's own namespace; created if it does not exist.
        private: Make a new repository private; None leaves it to the organisation.
        revision: Branch, created from `main` if it does not exist; `main` by default.
        create_pr: Open a pull request on `main` instead of committing to it.
        with_code: Push the code too, so that `trust_remote_code=True` loads the model where hf_vlm is not installed.
        commit_message: Summary of the commit.
        token: By default HF_TOKEN, or the token stored by `hf auth login`.

    Returns:
        The address of the repository, branch or pull request.

    Raises:
        ValueError: if the folder holds no complete checkpoint, or the name or options are invalid.
        PushError: if the Hub refused or could not be reached. The Hub is then as before the push.
    """
    folder = Path(folder)
    config = check_checkpoint(folder)
    validate_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"A pull request goes to main: leave out the revision {revision!r} or the pull request.")
    api = HfApi(token=token)
    with TemporaryDirectory() as scratch:
        source = copy_with_code(folder, config, Path(scratch)) if with_code else folder
        paths = {path.relative_to(source).as_posix(): path for path in files_to_push(source)}
        with one_line_errors(repo_id) as undone, ExitStack() as undo:
            if "/" not in repo_id:
                repo_id = f"{api.whoami()['name']}/{repo_id}"
            named = card_under_name(folder, source, repo_id) if CARD_NAME in paths else {}
            contents: dict[str, Path | bytes] = {**paths, **{name: text.encode() for name, text in named.items()}}
            additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
            parent = prepare(api, repo_id, private, revision, create_pr, undo, undone)
            # Not upload_folder: it commits in several batches if hf_xet is installed.
            commit = api.create_commit(
                repo_id,
                [*stale_weights(api, repo_id, parent, additions), *additions],
                commit_message=commit_message or f"Upload {config['model_type']} checkpoint",
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
            undo.pop_all()  # success: keep the new repository or branch
    branch = "" if revision in (None, "main") else f"/tree/{quote(revision, safe='')}"
    return commit.pr_url or f"{api.endpoint}/{repo_id}{branch}"


def push_run(args: TrainingArguments) -> str | None:
    """The push at the end of a recipe: with `--push_to_hub`, rank 0 pushes the output folder.

    Returns:
        The address of the repository, or None without `--push_to_hub`.
    """
    if not args.push_to_hub or args.process_index != 0:
        return None
    url = push_folder(
        args.output_dir,
        args.hub_model_id or Path(args.output_dir).absolute().name,
        private=args.hub_private_repo,
        revision=args.hub_revision,
        token=args.hub_token,
    )
    print(f"Pushed to {url}")
    return url


def check_checkpoint(folder: Path) -> dict:
    """The config of a complete checkpoint.

    Raises:
        ValueError: if the config, the processor or a weight file is missing or broken, or the model type is unknown.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no checkpoint: no config.json (push an adapter by PEFT's push_to_hub).")
    config = _read_json(folder / "config.json")
    if config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(f"{folder / 'config.json'}: model_type {config.get('model_type')!r} is not known.")
    if not (folder / "processor_config.json").is_file():
        raise ValueError(f"{folder} has no processor_config.json: save its processor there too, by save_pretrained.")
    for path in files_to_push(folder):
        if not is_inside(path, folder) and not is_inside(path, HF_HUB_CACHE):
            raise ValueError(f"{path} is a link to a file outside {folder}: replace it by a copy, or remove it.")
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name} cannot be read ({error}): save the model again.") from None
    return config


def weight_files(folder: Path) -> list[str]:
    """Names of a folder's weight files: one file, or the shards that its index names."""
    if (folder / "model.safetensors").is_file() or not (folder / INDEX).is_file():
        return ["model.safetensors"]
    shards = _read_json(folder / INDEX).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or not all(isinstance(name, str) and SHARD.fullmatch(name) for name in names):
        raise ValueError(f"{folder / INDEX} does not name shards such as model-00001-of-00002.safetensors: save again.")
    return sorted(names)


def code_files(folder: Path) -> list[str]:
    """Names of the modules that the configs of a checkpoint name, and of those that they import."""
    maps = [_read_json(path).get("auto_map") for path in folder.glob("*config.json")]
    references = [name for each in maps if isinstance(each, dict) for name in each.values()]
    modules = {name.split(".")[0] for name in references if isinstance(name, str) and "--" not in name}
    paths = [folder / f"{module}.py" for module in modules]
    paths += [Path(file) for path in paths if path.is_file() for file in get_relative_import_files(path)]
    return [path.name for path in paths]


def files_to_push(folder: Path) -> list[Path]:
    """The files of a checkpoint to push; weights and code only if its index and its configs name them."""
    weights = weight_files(folder)
    names = {*PUSHED, *weights, *([INDEX] if weights != ["model.safetensors"] else []), *code_files(folder)}
    second = [folder / SECOND_TOKENIZER / name for name in PROCESSOR]
    return [path for path in (*(folder / name for name in sorted(names)), *second) if path.is_file()]


def copy_with_code(folder: Path, config: dict, copy: Path) -> Path:
    """A copy of a checkpoint with its code, card and records.

    Raises:
        ValueError: if the checkpoint is of a native transformers architecture.
    """
    architecture = (config.get("architectures") or ["model of unknown class"])[0]
    if not any(architecture in family.classes for family in FAMILIES.values()):
        raise ValueError(f"{folder} holds a {architecture}, which is not of hf_vlm: push it without code.")
    model = load_complete(load_class(architecture), folder)
    save_with_code(model, AutoProcessor.from_pretrained(folder), copy)
    for name in ABOUT:
        if (folder / name).is_file():
            shutil.copy(folder / name, copy)
    return copy


def prepare(
    api: HfApi,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    undo: ExitStack,
    undone: list[str],
) -> str | None:
    """Creates the repository and the branch if they do not exist.

    Args:
        undo: Receives the calls that remove what was created.
        undone: Receives a sentence from each such call.

    Returns:
        The parent commit of the push.
    """
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if create_pr:
            raise
        api.create_repo(repo_id, private=private)
        undo.callback(_remove_repo, api, repo_id, undone)
        info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError("it is public: make it private in its settings, or push without private.")
    if revision in (None, "main"):
        return info.sha
    try:
        return api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        api.create_branch(repo_id, branch=revision, revision=info.sha)
        undo.callback(_remove_branch, api, repo_id, revision, info.sha, undone)
        return info.sha


def stale_weights(
    api: HfApi, repo_id: str, parent: str | None, additions: list[CommitOperationAdd]
) -> list[CommitOperationDelete]:
    """Deletions of an earlier push's weight files that this push does not replace; loading would still use them."""
    new = {addition.path_in_repo for addition in additions}
    old = set(api.list_repo_files(repo_id, revision=parent)) - new
    return [CommitOperationDelete(name) for name in sorted(old) if any(fnmatch(name, weights) for weights in WEIGHTS)]


@contextmanager
def one_line_errors(repo_id: str) -> Iterator[list[str]]:
    """Turns errors of the client and the Hub into a [`PushError`] that ends with the sentences in the yielded list."""
    undone: list[str] = []
    try:
        yield undone
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise PushError(" ".join([f"Not pushed to {repo_id}:", _reason(error), *undone])) from error


def _reason(error: BaseException) -> str:
    """The cause of an error, in one line."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps errors of large uploads
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 429 or status >= 500:
            return NOT_NOW.format(status=status)
        return REASONS.get(status) or f"the Hub refused it ({status}): {_flat(error.server_message)}"
    if isinstance(error, HTTPError):
        return f"no connection to the Hub: {_flat(error)}."
    return _flat(error)


def _remove_repo(api: HfApi, repo_id: str, undone: list[str]) -> None:
    """Deletes the repository that this push created, unless it has files by now."""
    try:
        if set(api.list_repo_files(repo_id)) <= {".gitattributes"}:
            api.delete_repo(repo_id)
            undone.append("The repository made for it was removed again.")
    except HTTPError:
        undone.append("The empty repository made for it could not be removed: delete it in its settings.")


def _remove_branch(api: HfApi, repo_id: str, branch: str, sha: str | None, undone: list[str]) -> None:
    """Deletes the branch that this push created, unless it has new commits."""
    try:
        if api.model_info(repo_id, revision=branch).sha == sha:
            api.delete_branch(repo_id, branch=branch)
            undone.append(f"The branch {branch} made for it was removed again.")
    except HTTPError:
        undone.append(f"The branch {branch} made for it could not be removed: delete it in its settings.")


def _flat(text: object) -> str:
    """Any text on one line."""
    return " ".join(str(text).split())


def _read_json(path: Path) -> dict:
    """The content of a JSON file; a ValueError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: save the model again.")
    return content


__all__ = ["PushError", "push_folder", "push_run"]
