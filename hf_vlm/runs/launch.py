"""Start a recipe: `launch(main)` parses a YAML file and command-line options into the arguments of `main`.

- The argument groups are the dataclasses that annotate `main`.
- `--config NAME` takes a packaged YAML file of the recipe, `--config PATH` any file; options override its keys.
- Unknown keys and options are refused with the most similar known one.
- Any error is one line without traceback, and the exit code 1; Ctrl-C is one line and the exit code 130.
"""

import dataclasses
import inspect
import os
import sys
import traceback
import types
from argparse import (
    SUPPRESS,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    RawDescriptionHelpFormatter,
)
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments
from trl import TrlParser

from ..terminal import MESSAGE_LENGTH, printable
from .catalogue import Recipe, nearest
from .quiet import hide_warnings

CONFIG_HELP = "Name of a packaged YAML file ({names}), or the path of your own."
TRACEBACK = "HF_VLM_TRACEBACK"


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with defaults, and the recipe's docstring with its line breaks."""


class RecipeParser(TrlParser):
    """TRL's parser of YAML and options for one recipe.

    Args:
        recipe: The recipe, for its YAML files and its name.
        groups: Dataclasses of arguments.
        description: Text above the options in the help.
    """

    def __init__(self, recipe: Recipe, groups: Sequence[type], description: str | None = None):
        super().__init__(
            groups,  # type: ignore[arg-type]  # DataClassType is a TypeVar there
            prog=recipe.name,
            usage="%(prog)s [--config NAME_OR_FILE] [OPTIONS]",
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self.recipe = recipe
        names = ", ".join(recipe.configs)
        self.add_argument("--config", metavar="NAME_OR_FILE", default=SUPPRESS, help=CONFIG_HELP.format(names=names))
        self._group_options(groups)

    def _group_options(self, groups: Sequence[type]) -> None:
        """Shows the options of each dataclass as a group of the help, those of transformers and TRL last."""
        titles, hints = {}, {}
        for group in groups:
            hints |= get_type_hints(group)
            for field in dataclasses.fields(group):
                titles[field.name] = group_title(group, field.name)
        self.hints = {name: hints[name] for name in titles}
        own = list(dict.fromkeys(title for title in titles.values() if not title.startswith("transformers")))
        sections = {title: self.add_argument_group(title) for title in (*own, *(set(titles.values()) - set(own)))}
        options = self._optionals._group_actions
        for action in [action for action in options if action.dest in titles]:
            options.remove(action)
            if holds(dict, self.hints[action.dest]):
                action.type, action.nargs = parse_value, None
            sections[titles[action.dest]]._group_actions.append(action)

    def error(self, message: str) -> NoReturn:
        """Raises an error of one line, where argparse would print two hundred options.

        Raises:
            ValueError: always, with argparse's message.
        """
        if "required" in message and self.recipe.configs:
            message += f"; or give --config with a YAML file ({', '.join(self.recipe.configs)})"
        raise ValueError(f"{message[:1].upper()}{message[1:]}. See {self.recipe.name} --help.")

    def parse_run(self, args: Sequence[str]) -> tuple:
        """The dataclasses of one run.

        Args:
            args: Command-line options.

        Raises:
            ValueError: if a file, key, option or value is wrong.
        """
        config_parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        config_parser.add_argument("--config", nargs="?")
        chosen, options = config_parser.parse_known_args(args)
        if chosen.config is not None:
            self._set_defaults_from(self.recipe.find_config(chosen.config))
        elif any(arg.split("=")[0] == "--config" for arg in args):
            raise ValueError(f"--config needs a name ({', '.join(self.recipe.configs)}) or the path of a YAML file.")
        known = self._option_string_actions
        for name in (option.split("=")[0] for option in options if option.startswith("--")):
            if name not in known:
                raise ValueError(f"There is no option {name}.{nearest(name, known)}")
        *groups, rest = self.parse_args_into_dataclasses(options, return_remaining_strings=True)
        if rest:
            raise ValueError(f"{rest[0]!r} belongs to no option: write --NAME VALUE.")
        return tuple(groups)

    def _set_defaults_from(self, path: Path) -> None:
        values = read_yaml(path)
        environment = values.pop("env", None) or {}
        if not isinstance(environment, dict):
            raise ValueError(f"{path}: env holds {environment!r}: write `NAME: value` lines below it.")
        for name, value in environment.items():
            os.environ[str(name)] = str(value)
        known = {action.dest for action in self._actions} - {"help", "config"}
        for key in values:
            if key not in known:
                raise ValueError(f"{path} has the unknown key {key!r}.{nearest(str(key), known)}")
            check_kind(path, key, values[key], self.hints[key])
        self.set_defaults_with_config(**values)


def group_title(group: type, name: str) -> str:
    """The section of the help in which an option stands."""
    if not issubclass(group, TrainingArguments):
        return (inspect.getdoc(group) or group.__name__).partition("\n")[0].rstrip(".")
    declared = next(parent for parent in group.__mro__ if name in inspect.get_annotations(parent))
    if declared.__module__.startswith("hf_vlm"):
        return "Training, hf_vlm's own arguments and defaults"
    return "transformers.TrainingArguments" if declared.__module__.startswith("transformers") else "trl.SFTConfig"


def holds(kind: type, hint: Any) -> bool:
    """Whether an annotation is a kind of container, of anything, or has it among its alternatives but no text."""
    if hint is kind or get_origin(hint) is kind:
        return True
    return get_origin(hint) is not dict and str not in get_args(hint) and any(holds(kind, a) for a in get_args(hint))


def parse_value(text: str) -> Any:
    """The mapping or list that a command-line option holds as YAML; None for null.

    Raises:
        ArgumentTypeError: if the text is not valid YAML, or is neither a mapping nor a list.
    """
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, dict) and any(":" in str(key) and item is None for key, item in value.items()):
        raise ArgumentTypeError(f"{text!r} has no space after a colon: write '{{key: value}}'")
    if not isinstance(value, dict | list | types.NoneType):
        raise ArgumentTypeError(f"{text!r} is not a mapping or list: write '{{key: value}}' or '[{{key: value}}]'")
    return value


def check_kind(path: Path, key: str, value: Any, hint: Any) -> None:
    """Refuses a list or mapping for a key that takes one value, and one value for a key that takes a list.

    Raises:
        ValueError: if the value does not fit.
    """
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = {get_origin(each) or each for each in alternatives}
    if value is None and types.NoneType not in kinds:
        raise ValueError(f"{path}: {key} has no value: write one, or leave the key out.")
    if list in kinds and str not in kinds and not isinstance(value, list | types.NoneType):
        raise ValueError(f"{path}: {key} holds {printable(value, 100)}: write a list, [{printable(value, 100)}].")
    if isinstance(value, list | dict) and type(value) not in kinds:
        raise ValueError(f"{path}: {key} holds {printable(value, 100)}: write one value.")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file.

    Raises:
        ValueError: if the file is not valid YAML, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}: write `key: value` lines.")
    return values


def parse_arguments(main: Callable, args: Sequence[str] | None = None) -> tuple:
    """The arguments of a recipe's `main`.

    Args:
        main: A function of dataclasses, in the recipe's script.
        args: Command-line options; those of this process by default.

    Raises:
        ValueError: if a file, key, option or value is wrong.
    """
    hints = get_type_hints(main)
    groups = [hints[name] for name in inspect.signature(main).parameters]
    recipe = Recipe(Path(inspect.getfile(main)).resolve())
    description = inspect.getdoc(inspect.getmodule(main))
    return RecipeParser(recipe, groups, description).parse_run(sys.argv[1:] if args is None else args)


def launch(main: Callable[..., None], args: Sequence[str] | None = None) -> None:
    """Runs a recipe. An error ends the process with one line and exit code 1, Ctrl-C with exit code 130.

    Set the environment variable HF_VLM_TRACEBACK=1 to see the traceback.

    Args:
        main: A function of dataclasses, in the recipe's script.
        args: Command-line options; those of this process by default.
    """
    groups: tuple = ()
    hide_warnings()
    try:
        groups = parse_arguments(main, args)
        main(*groups)
    except KeyboardInterrupt as interrupt:
        print(f"{interrupt or 'Interrupted.'} {how_to_resume(groups)}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"Error: {printable(in_one_line(error), MESSAGE_LENGTH)} ({TRACEBACK}=1 shows where.)", file=sys.stderr)
        sys.exit(1)


def in_one_line(error: Exception) -> str:
    """What an error says, in one line; for those that are not written for a user, with their type and place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, StrictDataclassError):
        return lines[-1]  # says there what is wrong
    if "No space left on device" in str(error) and "run the same command" not in str(error):
        return f"no space is left on the disk ({lines[0]}): make room, then run the same command again."
    if lines and isinstance(error, (ValueError, OSError, ModuleNotFoundError)):
        return lines[0]
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "hf_vlm" in frame.filename]
    place = f" in {Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}{place}: {lines[0] if lines else 'no message'}"


def how_to_resume(groups: Sequence[Any]) -> str:
    """Where the same command resumes after an interrupt."""
    folders = [group.output_dir for group in groups if isinstance(group, TrainingArguments)]
    found = [path for folder in folders for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdigit()]
    if found:
        return f"Run the same command to resume from {max(found, key=lambda path: int(path.name[11:]))}."
    return "There is no checkpoint yet: the same command begins anew." if folders else ""


__all__ = ["RecipeParser", "launch", "parse_arguments", "read_yaml"]
